"""Calibration of a planned step cache: the error of the final latents if one step is reused and the others computed.

Each batch of prompts is generated once without a cache. At every step t the prediction is made again as if the blocks
from depth d on were reused from step s, which needs no block: their states are known. The scheduler's step from both
predictions gives the error of the latents after t. How much of it is left in the final latents, the gain of step t, is
measured by continuing from an error of one (s, d) at some steps, and interpolated between these.
"""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from sglang_gen import signals
from sglang_gen.engine.caching.calibration_chain import CalibrationChain
from sglang_gen.engine.denoise import Predict, denoise
from sglang_gen.tune.plan_schedule import Errors

GAIN_STEPS = 10  # steps whose gain is measured
GAIN_ERROR = 3e-4  # squared error of the latents from which a gain is measured, relative to the final latents
LARGEST_FACTOR = 1e3  # by which an error is multiplied to get there


@dataclass
class LocalErrors:
    """Errors of the latents after single steps in one batch, and what is needed to continue from them."""

    squared: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # (s, t, d) -> [B]
    continued: dict[int, "Continuation"] = field(default_factory=dict)  # by step t


@dataclass(frozen=True)
class Continuation:
    """The state after a step: the exact latents, latents with an error, the scheduler and the generators' states."""

    exact: Tensor
    moved: Tensor
    scheduler: Any
    random: list[Tensor]


class Calibrator:
    """Stands in for the sampling loop of an engine whose network has a `CalibrationChain`. It returns exact latents.

    `guided` tells whether each step is guided: a step is reused only from one of its kind, which has the same rows.
    """

    def __init__(self, chain: CalibrationChain, guided: Sequence[bool]) -> None:
        self.chain, self.guided = chain, guided
        self.samples: dict[tuple[int, int, int], list[float]] = {}  # (s, t, d) -> the error of each image

    @property
    def errors(self) -> Errors:
        """The mean over all images of the squared error of the final latents, relative to their squares."""
        return {key: math.fsum(values) / len(values) for key, values in self.samples.items()}

    def sources(self, step: int) -> list[tuple[int, int]]:
        """The steps and depths that `step` may be reused from."""
        steps = sources(step, self.guided, self.chain.span)
        return [(source, depth) for source in steps for depth in self.chain.depths]

    def loop(
        self,
        predict: Predict,
        scheduler: Any,
        timesteps: Tensor,
        numbers: Sequence[int],
        latents: Tensor,
        generators: Sequence[torch.Generator],
        after_step: Callable[[], None],
    ) -> Tensor:
        local = LocalErrors()
        final = self._record(local, predict, scheduler, timesteps, numbers, latents, generators, after_step)
        gains = {}
        self.chain.recording = False
        for step, state in local.continued.items():
            signals.check()
            gains[step] = self._gain(step, state, final, predict, timesteps, numbers, generators)
        self.chain.recording = True
        size = _squared(final)
        for (source, step, depth), squared in local.squared.items():
            errors = squared / size * _interpolated(gains, step)
            self.samples.setdefault((source, step, depth), []).extend(errors.tolist())
        return final

    def _record(
        self,
        local: LocalErrors,
        predict: Predict,
        scheduler: Any,
        timesteps: Tensor,
        numbers: Sequence[int],
        latents: Tensor,
        generators: Sequence[torch.Generator],
        after_step: Callable[[], None],
    ) -> Tensor:
        """The exact latents; adds the errors of every step to `local`."""
        measured = _spread([step for step in range(len(timesteps)) if self.sources(step)], GAIN_STEPS)
        current: tuple[Tensor, int] = latents, 0  # arguments of the prediction of this step

        def noted(given: Tensor, index: int) -> Tensor:
            nonlocal current
            current = given, index
            return predict(given, index)

        exact_step = scheduler.step

        @wraps(exact_step)
        def step(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            given, index = current
            before, random = _copied(scheduler), _states(generators)
            after = exact_step(prediction, timestep, sample, *args, **kwargs)
            random_after = _states(generators)
            for source, depth in self.sources(index):
                self.chain.source = (source, depth)
                other = predict(given, index)
                self.chain.source = None
                _restore(generators, random)
                used = copy.deepcopy(before)
                moved = used.step(other, timestep, sample, *args, **kwargs)[0]
                local.squared[source, index, depth] = _squared(moved - after[0])
                if index in measured:
                    local.continued[index] = Continuation(after[0], moved, used, random_after)
            _restore(generators, random_after)
            return after

        scheduler.step = step
        try:
            return denoise(noted, scheduler, timesteps, numbers, latents, generators, after_step)
        finally:
            del scheduler.step

    def _gain(
        self,
        step: int,
        state: Continuation,
        final: Tensor,
        predict: Predict,
        timesteps: Tensor,
        numbers: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """The squared error of the final latents over that of the latents after a step `[B]`."""
        error = state.moved - state.exact
        factor = (GAIN_ERROR * _squared(final) / _squared(error)).sqrt().clamp(max=LARGEST_FACTOR).nan_to_num(1.0)
        start = (state.exact + factor.view(-1, *[1] * (error.ndim - 1)).to(error) * error).to(error.dtype)
        first, before = step + 1, _squared(start - state.exact)
        if first == len(timesteps):
            return torch.ones_like(before)
        random = _states(generators)
        _restore(generators, state.random)
        end = denoise(
            lambda latents, index: predict(latents, first + index),
            state.scheduler,
            timesteps[first:],
            numbers[first:],
            start,
            generators,
            signals.check,
        )
        _restore(generators, random)
        return torch.where(before > 0, _squared(end - final) / before, 1.0)


def sources(step: int, guided: Sequence[bool], span: int) -> list[int]:
    """The steps that `step` may be reused from: at most `span` before it, and guided like it and all steps between."""
    found: list[int] = []
    for source in range(step - 1, max(-1, step - 1 - span), -1):
        if guided[source] != guided[step]:
            break
        found.insert(0, source)
    return found


def _copied(scheduler: Any) -> Any:
    """A copy of a scheduler without the `step` that this module sets on it."""
    copied = copy.copy(scheduler)
    copied.__dict__.pop("step", None)
    return copy.deepcopy(copied)


def _states(generators: Sequence[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def _restore(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _squared(latents: Tensor) -> Tensor:
    """The sum of squares of each row, `[B]` in float64."""
    return latents.detach().cpu().double().flatten(1).square().sum(1)


def _spread(items: Sequence[int], count: int) -> set[int]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return set(items)
    return {items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)}


def _interpolated(gains: dict[int, Tensor], step: int) -> Tensor:
    """The gain of a step, by linear interpolation of logarithms between the steps that were measured."""
    steps = sorted(gains)
    right = min(bisect_right(steps, step), len(steps) - 1)
    left = max(right - 1, 0)
    if left == right or step >= steps[right]:
        return gains[steps[right]]
    weight = (step - steps[left]) / (steps[right] - steps[left])
    low, high = (gains[steps[place]].clamp(min=1e-12).log() for place in (left, right))
    return ((1 - weight) * low + weight * high).exp()
