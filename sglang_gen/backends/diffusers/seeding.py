"""Draws all noise of a diffusers pipeline from the generators of its samples.

Some pipelines pass no generator to their scheduler (those of flow matching), some schedulers accept none
(DPMSolverSDEScheduler), and both then draw from torch's global generator.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sglang_gen.engine.denoise import set_noise_sampler
from sglang_gen.errors import UserError

OFFSET = 0x9E3779B97F4A7C15  # so that the global generator's numbers differ from those of a sample's generator


def argument(generators: Sequence[torch.Generator]) -> torch.Generator | list[torch.Generator]:
    """The `generator` argument of a pipeline or scheduler: not all accept a list, and one generator draws the same."""
    return generators[0] if len(generators) == 1 else list(generators)


@contextmanager
def seeded(pipeline: Any, generators: Sequence[torch.Generator], device: str) -> Iterator[None]:
    """Within this context the pipeline's schedulers draw from the samples' CPU generators, one per sample.

    Other draws from the global generator depend only on the first sample's seed; its state is restored afterwards.
    Raises UserError for such a draw in a batch of several samples, because the samples would depend on each other.
    """
    cuda = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=cuda), ExitStack() as stack:
        seed = (generators[0].initial_seed() + OFFSET) % 2**63
        torch.default_generator.manual_seed(seed)
        for _ in cuda:
            torch.cuda.manual_seed(seed)
        shared = _Shared(type(pipeline).__name__, cuda, len(generators))
        for kind in {type(part) for part in vars(pipeline).values() if isinstance(part, SchedulerMixin)}:
            if hasattr(kind, "step"):
                stack.enter_context(_bound(kind, generators, shared.check))
        yield
        shared.check()


class _Shared:
    """Detects whether a batch of several samples draws from the global generators, which the samples share."""

    def __init__(self, name: str, cuda: list[int], samples: int) -> None:
        self.name, self.cuda, self.samples = name, cuda, samples
        self.before = self._states()

    def _states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self.cuda)]

    def check(self) -> None:
        """Raises UserError if numbers were drawn that do not depend on a single sample's seed."""
        if self.samples == 1 or all(map(torch.equal, self.before, self._states())):
            return
        raise UserError(
            f"sampling.batch_size: {self.name} draws noise without the samples' generators, so the samples of a batch "
            "would depend on each other; run with sampling.batch_size=1"
        )


@contextmanager
def _bound(kind: Any, generators: Sequence[torch.Generator], check: Callable[[], None]) -> Iterator[None]:
    """Replace `step` of the scheduler's class, not of an instance: some pipelines step copies of their scheduler."""
    original, own = kind.step, "step" in vars(kind)
    signature = inspect.signature(original)
    prepared: list[Any] = []  # schedulers that have already made a step in this batch

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        scheduler, sample = args[0], given.get("sample")
        if isinstance(sample, torch.Tensor) and len(generators) in (1, len(sample)):  # else a draw is refused
            if not any(scheduler is other for other in prepared):
                prepared.append(scheduler)
                set_noise_sampler(scheduler, sample, generators)
            if "generator" in signature.parameters and given.get("generator") is None:
                kwargs["generator"] = argument(generators)
        result = original(*args, **kwargs)
        check()
        return result

    kind.step = step
    try:
        yield
    finally:
        if own:
            kind.step = original
        else:
            del kind.step
