"""Times of stages and denoising steps. Only the end of a stage waits for the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sglang_gen.perf.memory import Checkpoint, Memory

STAGES = ("load", "text_encoding", "latents", "denoising", "decoding", "gathering", "saving")


def synchroniser(device: str) -> Callable[[], None]:
    """A function that waits until the device has finished all queued work."""
    if device != "cuda":
        return lambda: None
    import torch

    return torch.cuda.synchronize


@dataclass(frozen=True)
class Timer:
    """Moments of a device: `mark()` is the end of all work that is queued now, `elapsed_ms` the time between two marks.

    `synchronise` waits until all queued work is finished; marks are compared after that.
    """

    synchronise: Callable[[], None]
    mark: Callable[[], Any]
    elapsed_ms: Callable[[Any, Any], float]


def timer(device: str) -> Timer:
    """The timer of a device: events in the queue of a GPU, the host's clock on the CPU."""
    if device != "cuda":
        return Timer(synchroniser(device), lambda: time.perf_counter(), lambda start, end: 1000 * (end - start))
    import torch

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    return Timer(synchroniser(device), mark, lambda start, end: float(start.elapsed_time(end)))


@dataclass
class Clock:
    """Times of one phase of a run (loading, warmup or the timed generation).

    `enter(stage)` ends the previous stage; the times of a stage that is entered several times add up. `enter` also
    begins the first step, and `step()` ends a step and begins the next. The times of the steps are known when their
    stage is left, so that measuring them does not hold up the sampling loop.
    """

    timer: Timer
    memory: Memory
    stages_ms: dict[str, float] = field(default_factory=dict)
    steps_ms: list[tuple[int, int, float]] = field(default_factory=list)  # (batch, step, milliseconds)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    cpu_ms: float = 0.0  # processor time of this process in all stages, summed over its threads
    batch: int = 0
    _stage: str | None = None
    _since: float = 0.0
    _cpu_since: float = 0.0
    _marks: list[Any] = field(default_factory=list)  # the beginning of the stage, and the end of each of its steps

    def enter(self, stage: str, steps: int = 0) -> None:
        """End the current stage and begin `stage`, which has this number of denoising steps."""
        self.leave()
        self._stage, self._since, self._cpu_since = stage, time.perf_counter(), time.process_time()
        self._marks = [self.timer.mark()]

    def leave(self) -> None:
        """End the current stage, if there is one, and record its memory."""
        if self._stage is None:
            return
        self.timer.synchronise()
        elapsed = 1000 * (time.perf_counter() - self._since)
        self.cpu_ms += 1000 * (time.process_time() - self._cpu_since)
        self.stages_ms[self._stage] = self.stages_ms.get(self._stage, 0.0) + elapsed
        for step, (begun, ended) in enumerate(pairwise(self._marks)):
            self.steps_ms.append((self.batch, step, self.timer.elapsed_ms(begun, ended)))
        checkpoint = self.memory.checkpoint()
        before = self.checkpoints.get(self._stage)
        self.checkpoints[self._stage] = checkpoint.merge(before) if before else checkpoint
        self._stage = None

    def step(self) -> None:
        """End one denoising step, without waiting for it."""
        self._marks.append(self.timer.mark())

    @property
    def total_ms(self) -> float:
        return sum(self.stages_ms.values())
