"""What the report compares of each cell: time, quality and memory, and which cells no other cell beats in both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from sglang_gen.perf.attributes import ACCURACY, REFERENCE_ACCURACY
from sglang_gen.perf.dump_numbers import Measure, measure
from sglang_gen.perf.quality import decibels, squared_error_of
from sglang_gen.report.cells import Cell
from sglang_gen.report.image_data import Embedded

MEMORY_NAMES = {"peak_device_mb": "device memory", "peak_host_mb": "host memory"}


@dataclass(frozen=True)
class Metrics:
    """`time` is seconds per image; `psnr` is infinite for identical images, None if nothing was compared."""

    cell: Cell
    time: Measure | None
    psnr: float | None
    ssim: float | None
    memory: float | None  # MiB
    attributes: float | None = None  # accuracy, and that of the reference's images
    reference_attributes: float | None = None
    errors: tuple[float, ...] = ()  # mean squared error of each image against its reference, if all are known
    is_reference: bool = False


def memory_column(cells: Sequence[Cell]) -> str | None:
    """The memory that the report shows: that of the device if every measured cell has it, else of the host."""
    measured = [cell.row.memory for cell in cells if cell.row.memory]
    for column in MEMORY_NAMES:
        if measured and all(column in memory for memory in measured):
            return column
    return None


def states_quality(cells: Sequence[Cell]) -> bool:
    """Whether runs were compared with quality.reference. Then only these comparisons count."""
    return any(cell.row.quality for cell in cells)


def metrics(cells: Sequence[Cell], shown: Sequence[Embedded]) -> list[Metrics]:
    """One entry per cell, in order."""
    column, stated = memory_column(cells), states_quality(cells)
    own: dict[int, list[Embedded]] = {id(cell): [] for cell in cells}
    for one in shown:
        own[id(one.item.cell)].append(one)
    found = []
    for cell in cells:
        images = own[id(cell)]
        psnr, ssim = _stated(cell) if stated else _computed(images)
        if cell.has_random_weights:
            psnr = ssim = None
        found.append(
            Metrics(
                cell,
                time=measure(cell.seconds) if cell.seconds else None,
                psnr=psnr,
                ssim=ssim,
                memory=cell.row.memory.get(column) if column else None,
                attributes=cell.row.quality.get(ACCURACY),
                reference_attributes=cell.row.quality.get(REFERENCE_ACCURACY),
                errors=() if cell.has_random_weights else _errors(cell, images, stated),
                is_reference=not stated
                and psnr is not None
                and bool(images)
                and all(one.is_reference for one in images),
            )
        )
    return found


def _errors(cell: Cell, images: Sequence[Embedded], stated: bool) -> tuple[float, ...]:
    """Of the perf dump if it states them, else of the images of the sweep; empty if one is unknown."""
    if stated:
        samples = (cell.row.dump.get("quality") or {}).get("samples") or ()
        known = [0.0 if one.get("identical") else one.get("psnr") and squared_error_of(one["psnr"]) for one in samples]
    else:
        known = [0.0 if one.is_reference else one.squared_error for one in images]
    return tuple(error for error in known if error is not None) if None not in known else ()


def _stated(cell: Cell) -> tuple[float | None, float | None]:
    """PSNR and SSIM of the perf dump."""
    psnr = math.inf if cell.row.quality.get("identical") else cell.row.quality.get("psnr")
    return psnr, cell.row.quality.get("ssim")


def _computed(images: Sequence[Embedded]) -> tuple[float | None, float | None]:
    """PSNR of the mean squared error of all images, mean SSIM; of a reference, those of identical images."""
    if not images or any(one.squared_error is None and not one.is_reference for one in images):
        return None, None
    similar = [1.0 if one.is_reference else one.ssim for one in images]
    known = [value for value in similar if value is not None]
    return (
        decibels(fmean(one.squared_error or 0.0 for one in images)),
        fmean(known) if len(known) == len(similar) else None,
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, in the order of the first coordinate. Lower is better in both.

    A point is beaten by one that is no worse in both coordinates and better in one.
    """
    best = math.inf
    chosen: list[int] = []
    for index in sorted(range(len(points)), key=points.__getitem__):
        if points[index][1] < best or (chosen and points[index] == points[chosen[-1]]):
            best = points[index][1]
            chosen.append(index)
    return chosen
