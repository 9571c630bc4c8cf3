"""Finds scheduler settings without effect by running the scheduler with and without each of them."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.denoise import denoise

SCALES = torch.tensor([3.0, 1.0, 0.3, 0.1])[
    :, None, None, None
]  # of latents and predictions, so that thresholds take effect
SHAPE = (len(SCALES), 4, 8, 8)
TOKENS = 1024  # image tokens for which a dynamic shift is computed; between diffusers' base and max sequence length
MOST_STEPS = 50
ENOUGH = 4  # steps, so that there is a first one, a last one and some in between
CANNOT_RUN = (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, LookupError, ImportError)
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """Short runs of a scheduler class with a model's `config`; the predictions are the same in all runs.

    `shifts` is True if the pipeline computes a dynamic shift from the scheduler's settings.
    """

    kind: Any
    config: Settings
    steps: int
    shifts: bool

    def idle(self, given: Settings) -> dict[str, str]:
        """Those of the `given` settings that change nothing, each with the reason.

        All settings of a scheduler that cannot run without its pipeline are assumed to have an effect.
        """
        idle, before = {}, {**self._defaults, **self.config}
        for name, value in given.items():
            others = {key: other for key, other in given.items() if key != name}
            if before.get(name) != value and not self._acts(others, name, value):
                idle[name] = replace(self, steps=max(self.steps, ENOUGH))._reason(others, name, value)
        return idle

    @property
    def _defaults(self) -> dict[str, Any]:
        parameters = inspect.signature(self.kind.__init__).parameters.values()
        return {item.name: item.default for item in parameters if item.default is not item.empty}

    def _acts(self, others: Settings, name: str, value: Any) -> bool:
        """Whether the setting changes the result of a run; True if the scheduler cannot run."""
        pairs = [
            (self._run(others, levels), self._run({**others, name: value}, levels))
            for levels in (False, True)  # the two ways in which pipelines set timesteps
        ]
        made = [pair for pair in pairs if pair != (None, None)]
        return not made or any(one is None or other is None or not _same(one, other) for one, other in made)

    def _reason(self, others: Settings, name: str, value: Any) -> str:
        """Why this setting has no effect: trained_betas or a boolean setting override it, or too few steps are run."""
        if self._acts(others, name, value):
            return "nothing depends on it in so few steps"
        now = {**self._defaults, **self.config, **others}
        if name.startswith("beta") and now.get("trained_betas") is not None:
            return "trained_betas are given"
        for switch, default in self._defaults.items():
            if isinstance(default, bool) and switch != name:
                turned = {**others, switch: not now[switch]}
                if self._run(turned, False) is not None and self._acts(turned, name, value):
                    return f"{switch} is {str(bool(now[switch])).lower()}"
        return f"nothing depends on it beside the other settings of {self.kind.__name__}"

    def _run(self, settings: Settings, levels: bool) -> list[Tensor] | None:
        """Timesteps, noise levels and the latents of every step; None if the scheduler cannot run in this way."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                scheduler = self.kind.from_config(self.config, **settings)
                scheduler.set_timesteps(**self._timesteps(scheduler.config, levels))
                return [scheduler.timesteps.clone(), *_levels(scheduler), *_latents(scheduler)]
            except CANNOT_RUN:
                return None

    def _timesteps(self, config: Any, levels: bool) -> dict[str, Any]:
        """Arguments of `set_timesteps`: noise levels or their number, and the dynamic shift as pipelines compute it."""
        steps = min(self.steps, MOST_STEPS)
        arguments: dict[str, Any] = {"num_inference_steps": steps}
        if levels:
            arguments = {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist()}
        if config.get("use_dynamic_shifting"):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            arguments["mu"] = low + (high - low) * (TOKENS - few) / (many - few) if self.shifts else 1.0
        return arguments


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _levels(scheduler: Any) -> Iterator[Tensor]:
    for name in ("sigmas", "init_noise_sigma"):
        if (value := getattr(scheduler, name, None)) is not None:
            yield torch.as_tensor(value).clone()


def _latents(scheduler: Any) -> list[Tensor]:
    """The latents passed to the network in each step, and the final latents."""
    generators, seen = [torch.Generator().manual_seed(row) for row in range(len(SCALES))], list[Tensor]()
    drawn = SCALES * torch.randn((len(scheduler.timesteps) + 1, *SHAPE), generator=torch.Generator().manual_seed(7))

    def predict(latents: Tensor, index: int) -> Tensor:
        seen.append(latents.clone())
        return drawn[index + 1]

    numbers = range(len(scheduler.timesteps))
    last = denoise(predict, scheduler, scheduler.timesteps, numbers, drawn[0], generators, lambda: None)
    return [*seen, last]
