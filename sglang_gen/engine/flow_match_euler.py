"""Euler's method for flow matching (Lipman et al. 2023; Esser et al. 2024), bitwise equal to diffusers' scheduler.

diffusers' class imports torch's compiler and, if installed, scipy, which takes two of the seven seconds of a start. It
is still used for the schedules that are not implemented here (Karras, exponential, beta, inverted sigmas), and all
other schedulers are diffusers' own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCHEDULER_NAME = "FlowMatchEulerDiscreteScheduler"
CONFIG_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "time_shift_type": "exponential", "stochastic_sampling": False,
}  # fmt: skip
ELSEWHERE = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def knows(config: Mapping[str, Any]) -> bool:
    """Whether everything in a scheduler_config.json is implemented here."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    plain = given.keys() <= CONFIG_DEFAULTS.keys() and not any(given.get(key) for key in ELSEWHERE)
    return plain and given.get("time_shift_type", "exponential") in ("exponential", "linear")


class FlowMatchEuler:
    """The scheduler: `timesteps` `[S]` and their noise levels `sigmas` `[S + 1]`, whose last element is 0."""

    order = 1

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {**CONFIG_DEFAULTS, **config}
        self.timesteps = self.sigmas = torch.empty(0, device="cpu")
        self.index = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> "FlowMatchEuler":
        """A scheduler with this config and `changes` to it; same interface as diffusers' `from_config`."""
        return cls({**config, **changes})

    def set_timesteps(
        self, num_inference_steps: int | None = None, sigmas: Sequence[float] | None = None, mu: float | None = None
    ) -> None:
        """Set shifted noise levels: `num_inference_steps` evenly spaced ones, or `sigmas`. `mu` is the dynamic shift.

        Raises ValueError if the config has dynamic shifting and `mu` is None.
        """
        if sigmas is None:
            assert num_inference_steps is not None
            levels = self._even(num_inference_steps)
        else:
            levels = np.array(sigmas).astype(np.float32)
        shifted = torch.from_numpy(self._shifted(levels, mu)).to(torch.float32)
        self.timesteps = shifted * self.config["num_train_timesteps"]
        self.sigmas = torch.cat([shifted, torch.zeros(1, device="cpu")])
        self.index = 0

    def _even(self, steps: int) -> "np.ndarray[Any, Any]":
        """Evenly spaced levels between the first and last training level, both already shifted by a fixed shift."""
        count, shift = self.config["num_train_timesteps"], self.config["shift"]
        ends = torch.tensor([count, 1], dtype=torch.float32, device="cpu") / count
        if not self.config["use_dynamic_shifting"]:
            ends = shift * ends / (1 + (shift - 1) * ends)
        most, least = ends.tolist()
        levels: np.ndarray[Any, Any] = np.linspace(most * count, least * count, steps) / count
        return levels

    def _shifted(self, levels: "np.ndarray[Any, Any]", mu: float | None) -> "np.ndarray[Any, Any]":
        c = self.config
        if c["use_dynamic_shifting"]:
            if mu is None:
                raise ValueError("`mu` must be given where `use_dynamic_shifting` is set")
            shift = math.exp(mu) if c["time_shift_type"] == "exponential" else mu
            levels = shift / (shift + (1 / levels - 1) ** 1.0)
        else:
            levels = c["shift"] * levels / (1 + (c["shift"] - 1) * levels)
        if c["shift_terminal"]:
            left = 1 - levels
            levels = 1 - left / (left[-1] / (1 - c["shift_terminal"]))
        return levels

    def set_begin_index(self, index: int) -> None:
        """Start at this step; image-to-image skips the ones before it."""
        self.index = index

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Add noise to `sample` `[B, ...]` at the level of the first step, whose `timestep` is not read."""
        sigma = self.sigmas.to(sample)[self.index]
        return sigma * noise + (1.0 - sigma) * sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Sequence[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The next latents `[B, ...]`, computed in float32 and returned in the dtype of the prediction.

        With `stochastic_sampling` every step draws new noise, for each sample from its own generator.
        """
        sigma, following = self.sigmas[self.index], self.sigmas[self.index + 1]
        self.index += 1
        sample = sample.to(torch.float32)
        if self.config["stochastic_sampling"]:
            assert generator is not None
            drawn = [torch.randn((1, *sample.shape[1:]), generator=each, device="cpu") for each in generator]
            clean = sample - sigma * model_output
            return (
                ((1.0 - following) * clean + following * torch.cat(drawn).to(sample.device)).to(model_output.dtype),
            )
        return ((sample + (following - sigma) * model_output).to(model_output.dtype),)
