"""What a process asks of a GPU beside computing: its name, memory, streams and events."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from sglang_gen.backends.native import engine
from sglang_gen.perf.clock import Clock

MEMORY = 80 * 2**30  # bytes


class Event:
    """An event of a GPU that is never behind the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


class Stream:
    """A stream of a GPU that is never behind the host."""

    def wait_stream(self, other: "Stream") -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


def stand_ins(gpu: Any, free: int, count: int) -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, value) of each; the clock of a run tells the fake GPU its stage.

    The stage of denoising is "denoising" while texts and timesteps are embedded, and "loop" from the first step on.
    """
    cuda = torch.cuda
    yield cuda, "_lazy_init", lambda: None
    yield cuda, "is_available", lambda: True
    yield cuda, "device_count", lambda: count
    yield cuda, "current_device", lambda: 0
    yield cuda, "set_device", lambda _: None
    yield cuda, "get_device_name", lambda *_: "a fake GPU"
    yield cuda, "get_device_capability", lambda *_: (9, 0)
    yield (
        cuda,
        "get_device_properties",
        lambda *_: SimpleNamespace(total_memory=MEMORY, name="a fake GPU", major=9, minor=0, multi_processor_count=132),
    )
    yield cuda, "mem_get_info", lambda *_: (free, MEMORY)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        yield cuda, name, lambda *_: 0
    idle = ("reset_peak_memory_stats", "empty_cache", "synchronize", "manual_seed", "manual_seed_all", "_sleep")
    for name in idle:
        yield cuda, name, lambda *_: None
    yield cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)
    yield cuda, "set_rng_state", lambda *_, **__: None
    yield cuda, "device", lambda _: nullcontext()
    yield cuda, "Event", Event
    yield cuda, "Stream", Stream
    yield cuda, "current_stream", lambda *_: Stream()
    yield cuda, "stream", lambda _: nullcontext()
    enter, leave, denoise = Clock.enter, Clock.leave, engine.denoise

    def entered(self: Clock, stage: str, steps: int = 0) -> None:
        enter(self, stage, steps)
        gpu.stage = stage

    def left(self: Clock) -> None:
        leave(self)
        gpu.stage = None

    yield Clock, "enter", entered
    yield Clock, "leave", left

    def looped(*args: Any) -> Any:
        gpu.stage = "loop"
        latents = denoise(*args)
        gpu.stage = "denoising"
        return latents

    yield engine, "denoise", looped
