"""Euler's method for flow matching (Lipman et al. 2023; Esser et al. 2024), number by number that of diffusers.

diffusers' own class imports torch's compiler and, where it is installed, scipy: two of the seven seconds of a start. It
stays in use for every schedule that is not here (Karras, exponential, beta, inverted) and for all other schedulers.
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
    """Whether a scheduler_config.json asks for nothing but what is here."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    plain = given.keys() <= CONFIG_DEFAULTS.keys() and not any(given.get(key) for key in ELSEWHERE)
    return plain and given.get("time_shift_type", "exponential") in ("exponential", "linear")


class FlowMatchEuler:
    """Steps along `timesteps` `[S]`, whose noise levels are `sigmas` `[S + 1]`; the last is 0."""

    order = 1

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {**CONFIG_DEFAULTS, **config}
        self.timesteps = self.sigmas = torch.empty(0)
        self.index = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> "FlowMatchEuler":
        """A scheduler of this configuration but for the changes, as diffusers' schedulers are made."""
        return cls({**config, **changes})

    def set_timesteps(
        self, num_inference_steps: int | None = None, sigmas: Sequence[float] | None = None, mu: float | None = None
    ) -> None:
        """`num_inference_steps` even ones, or those of the given noise levels, shifted; `mu` is the dynamic shift.

        Raises ValueError where the shift is dynamic and there is no `mu`.
        """
        if sigmas is None:
            assert num_inference_steps is not None
            levels = self._even(num_inference_steps)
        else:
            levels = np.array(sigmas).astype(np.float32)
        shifted = torch.from_numpy(self._shifted(levels, mu)).to(torch.float32)
        self.timesteps = shifted * self.config["num_train_timesteps"]
        self.sigmas = torch.cat([shifted, torch.zeros(1)])
        self.index = 0

    def _even(self, steps: int) -> "np.ndarray[Any, Any]":
        """Levels between the first and the last of training, which a fixed shift has moved already."""
        count, shift = self.config["num_train_timesteps"], self.config["shift"]
        ends = torch.tensor([count, 1], dtype=torch.float32) / count
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
        """The step that comes first, where an input picture spares those before it."""
        self.index = index

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`sample` `[B, ...]` with noise on it, as much as the first step expects; `timestep` is what it says."""
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
        """The next latents `[B, ...]`, computed in float32, in the dtype of the prediction.

        With `stochastic_sampling` noise is drawn anew in every step, of each sample by its own generator.
        """
        sigma, following = self.sigmas[self.index], self.sigmas[self.index + 1]
        self.index += 1
        sample = sample.to(torch.float32)
        if self.config["stochastic_sampling"]:
            assert generator is not None
            drawn = [torch.randn((1, *sample.shape[1:]), generator=each) for each in generator]
            clean = sample - sigma * model_output
            return (
                ((1.0 - following) * clean + following * torch.cat(drawn).to(sample.device)).to(model_output.dtype),
            )
        return ((sample + (following - sigma) * model_output).to(model_output.dtype),)
