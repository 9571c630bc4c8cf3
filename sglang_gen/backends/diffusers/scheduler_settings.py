"""Settings of a scheduler that change nothing beside its other settings, found by running it with and without them."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sglang_gen import log
from sglang_gen.engine.denoise import denoise

SCALES = torch.tensor([3.0, 1.0, 0.3, 0.1])[:, None, None, None]  # of latents and predictions: thresholds see all sizes
SHAPE = (len(SCALES), 4, 8, 8)
TOKENS = 1024  # of an image for which a dynamic shift is computed, between diffusers' two ends
MOST_STEPS = 50
ENOUGH = 4  # steps of which each kind is there: a first, a last, and some between
CANNOT_RUN = (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, LookupError, ImportError)
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """Short runs of a scheduler class with a model's `config`, on a prediction that is the same in all of them.

    `shifts` says that the pipeline computes a dynamic shift from the scheduler's settings.
    """

    kind: Any
    config: Settings
    steps: int
    shifts: bool

    def idle(self, given: Settings) -> dict[str, str]:
        """Of the `given` settings those that change nothing, each with the reason.

        A scheduler that cannot be run without its pipeline is taken to use all of them.
        """
        found, before = {}, {**self._defaults, **self.config}
        for name, value in given.items():
            others = {key: other for key, other in given.items() if key != name}
            if before.get(name) != value and not self._acts(others, name, value):
                found[name] = replace(self, steps=max(self.steps, ENOUGH))._reason(others, name, value)
        return found

    @property
    def _defaults(self) -> dict[str, Any]:
        parameters = inspect.signature(self.kind.__init__).parameters.values()
        return {each.name: each.default for each in parameters if each.default is not each.empty}

    def _acts(self, others: Settings, name: str, value: Any) -> bool:
        """Whether the setting changes a number of a run; True where no run can be made."""
        pairs = [
            (self._run(others, levels), self._run({**others, name: value}, levels))
            for levels in (False, True)  # the two ways in which pipelines set timesteps
        ]
        made = [pair for pair in pairs if pair != (None, None)]
        return not made or any(one is None or other is None or not _same(one, other) for one, other in made)

    def _reason(self, others: Settings, name: str, value: Any) -> str:
        """The other setting that makes this one idle: betas that are given, or a switch."""
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
        """Timesteps, noise levels and latents of every step; None where it cannot be run in this way."""
        with warnings.catch_warnings(), log.quieter("diffusers"):
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
        found: dict[str, Any] = {"num_inference_steps": steps}
        if levels:
            found = {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist()}
        if config.get("use_dynamic_shifting"):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            found["mu"] = low + (high - low) * (TOKENS - few) / (many - few) if self.shifts else 1.0
        return found


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _levels(scheduler: Any) -> Iterator[Tensor]:
    for name in ("sigmas", "init_noise_sigma"):
        if (held := getattr(scheduler, name, None)) is not None:
            yield torch.as_tensor(held).clone()


def _latents(scheduler: Any) -> list[Tensor]:
    """What a network is given in each step, and the last latents."""
    generators, seen = [torch.Generator().manual_seed(row) for row in range(len(SCALES))], list[Tensor]()
    drawn = SCALES * torch.randn((len(scheduler.timesteps) + 1, *SHAPE), generator=torch.Generator().manual_seed(7))

    def predict(latents: Tensor, index: int) -> Tensor:
        seen.append(latents.clone())
        return drawn[index + 1]

    numbers = range(len(scheduler.timesteps))
    last = denoise(predict, scheduler, scheduler.timesteps, numbers, drawn[0], generators, lambda: None)
    return [*seen, last]
