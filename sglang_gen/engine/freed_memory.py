"""Returns memory that was freed to the operating system, which C's allocator keeps for later allocations."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Return free pages of the heap. Only glibc has a function for it; elsewhere nothing happens."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
