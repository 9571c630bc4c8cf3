"""Memory that glibc's allocator holds for a sequence of allocations, which is more than the blocks in use.

A block is taken from the smallest free part of the heap that holds it, else from the top of the heap, else it is mapped
if it has at least `threshold` bytes, else the heap grows. A mapped block that is released returns to the kernel, and
raises the threshold to its size, up to 32 MiB. The top of the heap returns once it is twice as large. (malloc in glibc
2.1 to 2.42; `mallopt(3)`.)
"""

import bisect
from collections.abc import Iterable

from sglang_gen.dry_run.live_memory import RETURNED, Event

FIRST_THRESHOLD = 128 * 1024  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD
LARGEST_THRESHOLD = 32 * 2**20
PAGE = 4096
ALIGNMENT = 96  # of a block whose address torch aligns to 64 bytes


class Heap:
    """`held` is what the process has from the kernel, `most` its peak."""

    def __init__(self) -> None:
        self.threshold, self.trim = FIRST_THRESHOLD, FIRST_THRESHOLD
        self.end = self.top = self.mapped = self.most = 0  # addresses below `end` are used or free, `top` is above them
        self.starts: dict[int, int] = {}  # of free parts -> size
        self.ends: dict[int, int] = {}  # of free parts -> start
        self.sizes: list[tuple[int, int]] = []  # (size, start) of free parts, in order
        self.blocks: dict[int, tuple[int | None, int]] = {}  # number -> start (None: mapped) and size

    @property
    def held(self) -> int:
        return self.end + self.top + self.mapped

    def replay(self, events: Iterable[Event]) -> int:
        """Allocate and release blocks, and return freed memory; returns the peak of `held` meanwhile."""
        self.most = self.held
        for number, size in events:
            if size is not None:
                self.allocate(number, size)
            elif (number, size) == RETURNED:
                self.return_freed()
            elif number in self.blocks:
                self.release(number)
        return self.most

    def allocate(self, number: int, size: int) -> None:
        size += ALIGNMENT
        index = bisect.bisect_left(self.sizes, (size, -1))
        if index < len(self.sizes):
            whole, start = self.sizes[index]
            self._take(start)
            if whole > size:
                self._free(start + size, whole - size)
            self.blocks[number] = (start, size)
            return
        if self.top < size and size >= self.threshold:
            pages = -(-size // PAGE) * PAGE
            self.mapped += pages
            self.blocks[number] = (None, pages)
        else:
            if self.top < size:
                self.top += -(-(size + FIRST_THRESHOLD - self.top) // PAGE) * PAGE
            self.blocks[number] = (self.end, size)
            self.end, self.top = self.end + size, self.top - size
        self.most = max(self.most, self.held)

    def release(self, number: int) -> None:
        start, size = self.blocks.pop(number)
        if start is None:
            self.mapped -= size
            if self.threshold < size <= LARGEST_THRESHOLD:
                self.threshold, self.trim = size, 2 * size
            return
        if (before := self.ends.get(start)) is not None:
            size += self._take(before)
            start = before
        if start + size in self.starts:
            size += self._take(start + size)
        if start + size < self.end:
            self._free(start, size)
            return
        self.end, self.top = start, self.top + size
        if self.top >= self.trim:
            self.top = FIRST_THRESHOLD

    def return_freed(self) -> None:
        """Return all free parts to the kernel, as malloc_trim(3) does."""
        self.starts, self.ends, self.sizes = {}, {}, []
        self.end = self.top = 0  # addresses no longer matter: using a returned part takes as much as a larger heap
        for number, (start, size) in self.blocks.items():
            if start is not None:
                self.blocks[number] = (self.end, size)
                self.end += size

    def _free(self, start: int, size: int) -> None:
        self.starts[start], self.ends[start + size] = size, start
        bisect.insort(self.sizes, (size, start))

    def _take(self, start: int) -> int:
        size = self.starts.pop(start)
        del self.ends[start + size]
        self.sizes.pop(bisect.bisect_left(self.sizes, (size, start)))
        return size
