"""Wall-clock times of stages and denoising steps, synchronised with the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_gen.perf.memory import Checkpoint, Memory

STAGES = ("load", "text_encoding", "latents", "denoising", "decoding", "gathering", "saving")


def synchroniser(device: str) -> Callable[[], None]:
    """A function that waits until the device has finished all queued work."""
    if device != "cuda":
        return lambda: None
    import torch

    return torch.cuda.synchronize


@dataclass
class Clock:
    """Times of one phase of a run (loading, warmup or the timed generation).

    `enter(stage)` ends the previous stage; the times of a stage that is entered several times add up. `enter` also
    starts the step timer, and `step()` ends a step.
    """

    synchronise: Callable[[], None]
    memory: Memory
    stages_ms: dict[str, float] = field(default_factory=dict)
    steps_ms: list[tuple[int, int, float]] = field(default_factory=list)  # (batch, step, milliseconds)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    batch: int = 0
    _stage: str | None = None
    _since: float = 0.0
    _step_since: float = 0.0
    _step: int = 0

    def enter(self, stage: str) -> None:
        """End the current stage and begin `stage`."""
        self.leave()
        self._stage, self._since = stage, time.perf_counter()
        self._step_since, self._step = self._since, 0

    def leave(self) -> None:
        """End the current stage, if there is one, and record its memory."""
        if self._stage is None:
            return
        self.synchronise()
        elapsed = 1000 * (time.perf_counter() - self._since)
        self.stages_ms[self._stage] = self.stages_ms.get(self._stage, 0.0) + elapsed
        checkpoint = self.memory.checkpoint()
        before = self.checkpoints.get(self._stage)
        self.checkpoints[self._stage] = checkpoint.merge(before) if before else checkpoint
        self._stage = None

    def step(self) -> None:
        """End one denoising step."""
        self.synchronise()
        now = time.perf_counter()
        self.steps_ms.append((self.batch, self._step, 1000 * (now - self._step_since)))
        self._step_since, self._step = now, self._step + 1

    @property
    def total_ms(self) -> float:
        return sum(self.stages_ms.values())
