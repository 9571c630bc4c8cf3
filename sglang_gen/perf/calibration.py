"""A fixed piece of work beside each generation, whose processor time shows how fast the processor is at that moment.

Other processes on a machine take away cache, memory bandwidth and parts of cores, so they raise the processor time of
a program that has not changed, on a busy machine by 20 % within minutes. The same processor time of a fixed work rises
with it, and the ratio of both hardly changes. The work is a mixture of matrix products and convolutions in the dtype of
the run.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PRODUCTS, WIDTH = 6, 512  # products of square matrices, and their width
CONVOLUTIONS, CHANNELS, PIXELS = 8, 64, 64  # convolutions with kernels of 3 x 3, their channels, height and width


@dataclass
class Calibration:
    """Measures the work before and after each generation; without `tensors` nothing is measured."""

    tensors: "tuple[torch.Tensor, ...] | None"
    generations: list[float] = field(default_factory=list)  # milliseconds of processor time, the mean of both

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Context of one generation."""
        if self.tensors is None:
            yield
            return
        before = self._cpu_ms(self.tensors)
        yield
        self.generations.append((before + self._cpu_ms(self.tensors)) / 2)

    @staticmethod
    def _cpu_ms(tensors: "tuple[torch.Tensor, ...]") -> float:
        from torch.nn.functional import conv2d

        matrix, image, kernel = tensors
        start = time.process_time()
        for _ in range(PRODUCTS):
            matrix @ matrix
        for _ in range(CONVOLUTIONS):
            conv2d(image, kernel, padding=1)
        return 1000 * (time.process_time() - start)


def calibration(wanted: bool, dtype: str) -> Calibration:
    """The calibration of a run with this dtype; one that measures nothing unless it is wanted."""
    if not wanted:
        return Calibration(None)
    import torch

    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    shapes = ((WIDTH, WIDTH), (1, CHANNELS, PIXELS, PIXELS), (CHANNELS, CHANNELS, 3, 3))
    found = Calibration(tuple(torch.randn(shape, generator=generator).to(kind) for shape in shapes))
    with found.generation():  # the first calls choose kernels
        pass
    found.generations.clear()
    return found


def add(report: dict[str, Any], found: Calibration) -> None:
    """Add `calibration_cpu_ms` to a dump and to its repeats; None in the dump of a run without calibration."""
    report["calibration_cpu_ms"] = round(found.generations[0], 3) if found.generations else None
    for repeat, milliseconds in zip(report["repeats"], found.generations, strict=False):
        repeat["calibration_cpu_ms"] = round(milliseconds, 3)
