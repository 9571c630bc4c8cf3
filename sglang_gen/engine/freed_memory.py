"""Returns memory that was freed to the operating system, which C's allocator keeps for later allocations."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

LARGE = 4 * 2**20  # bytes of a module's input: what smaller modules leave in the heap is not worth the time
_traced: ContextVar[Callable[[], None] | None] = ContextVar("traced", default=None)


def return_freed_memory() -> None:
    """Return free pages of the heap. Only glibc has a function for it; elsewhere nothing happens."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def return_freed_memory_before(module: nn.Module) -> None:
    """Return freed memory before each call of `module` with a tensor on a CPU that has at least 4 MiB."""
    module.register_forward_pre_hook(_before_call)


def _before_call(module: nn.Module, args: tuple[Any, ...]) -> None:
    if args[0].nbytes < LARGE:
        return
    if (note := _traced.get()) is not None:
        note()
    elif args[0].device.type == "cpu":
        return_freed_memory()


@contextmanager
def traced(note: Callable[[], None]) -> Iterator[None]:
    """While a module is traced, call `note` where freed memory would be returned."""
    token = _traced.set(note)
    try:
        yield
    finally:
        _traced.reset(token)
