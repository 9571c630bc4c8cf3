"""Profiler traces (perf.trace): one batch under torch.profiler, with stages, steps and blocks as named ranges."""

import gzip
import io
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sglang_gen import files
from sglang_gen.perf.clock import Clock


@dataclass
class TracedClock(Clock):
    """A clock whose stages, and the denoising steps inside them, are ranges of the profiler."""

    _ranges: list[Any] = field(default_factory=list)  # the open ranges: the stage, and the step in it
    _steps: int = 0
    _step: int = 0

    def enter(self, stage: str, steps: int = 0) -> None:
        if stage == self._stage and not steps:  # entered again, the stage continues
            return
        super().enter(stage, steps)  # leaves the current stage
        self._steps, self._step = steps, 0
        self._open(stage)
        self._open_step()

    def leave(self) -> None:
        super().leave()  # waits for the device, which belongs to the stage
        while self._ranges:
            self._close()

    def step(self) -> None:
        super().step()
        if self._step < self._steps:
            self._close()
            self._step += 1
            self._open_step()

    def _open_step(self) -> None:
        if self._step < self._steps:
            self._open(f"step {self._step}")

    def _open(self, name: str) -> None:
        self._ranges.append(record_function(name).__enter__())  # type: ignore[no-untyped-call]

    def _close(self) -> None:
        self._ranges.pop().__exit__(None, None, None)


def record(path: Path, device: str, named_blocks: AbstractContextManager[None], work: Callable[[], Any]) -> None:
    """Run `work` under the profiler and write the trace to `path`. Raises RunError if it cannot be written."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with named_blocks, profile(activities=activities) as profiler:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(exported))
        files.save_bytes(path, _compressed(exported, path.name.removesuffix(".gz")))


def _compressed(exported: Path, name: str) -> bytes:
    """The exported JSON with gzip. The name of the temporary file, which the profiler stores, is replaced by `name`."""
    stored = io.BytesIO()
    with exported.open("rb") as source, gzip.open(stored, "wb") as target:
        for line in source:
            target.write(line.replace(str(exported).encode(), name.encode()))
    return stored.getvalue()
