"""What is judged on a machine that others use too: adjusted processor times, and wall clocks while it is quiet."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import exp, log
from statistics import fmean
from typing import TYPE_CHECKING

from sglang_gen.perf.covariance import LEAST_OBSERVATIONS, adjusted, adjusted_pairs, at_one_speed
from sglang_gen.perf.dump_reader import CALIBRATION, Dump
from sglang_gen.perf.log_ratio import Difference, Method
from sglang_gen.perf.statistics import geometric_mean

if TYPE_CHECKING:
    from sglang_gen.perf.compare import Row

CPU = "cpu"
WALL_CLOCK = ("total", "stage", "step")
QUIET = 0.025  # noise of the dumps up to which their wall clock is judged beside processor time
Speeds = tuple[list[float], list[float]]  # logarithms of the calibrations of both sides
Compared = Callable[[Sequence[float], Sequence[float]], Difference]


def speeds(base: Sequence[Dump], new: Sequence[Dump], method: Method) -> Speeds | None:
    """The calibration of each dump; None if one has none, if there are few dumps, or for independent dumps."""
    if method is Method.INDEPENDENT or len(base) + len(new) < LEAST_OBSERVATIONS:
        return None
    if any(not {CPU, CALIBRATION} <= dump.metrics.keys() for dump in (*base, *new)):
        return None
    left, right = ([log(geometric_mean(dump.metrics[CALIBRATION])) for dump in side] for side in (base, new))
    return left, right


def difference(metric: str, method: Method, found: Speeds | None) -> Compared:
    """The function that compares two sides: of processor times an analysis of covariance, if there are speeds."""
    if metric == CPU and found is not None:
        compare = adjusted_pairs if method is Method.PAIRED else adjusted
        return partial(compare, base_speeds=found[0], new_speeds=found[1])
    return method.difference


def at_mean_speed(dumps: Sequence[Dump]) -> list[Dump] | None:
    """The dumps of a history, in the order of time, with their processor times at one speed of the machine.

    None if one has no calibration, or if there are few dumps.
    """
    if len(dumps) < LEAST_OBSERVATIONS or any(not {CPU, CALIBRATION} <= dump.metrics.keys() for dump in dumps):
        return None
    times, found = ([log(geometric_mean(dump.metrics[name])) for dump in dumps] for name in (CPU, CALIBRATION))
    adjusted_times = at_one_speed(times, found)
    return [
        replace(dump, metrics={**dump.metrics, CPU: [exp(value)]})
        for dump, value in zip(dumps, adjusted_times, strict=True)
    ]


def about_speeds(rows: Sequence["Row"], found: Speeds | None, dumps: Sequence[Dump], method: Method) -> list[str]:
    """A note about the adjustment of processor times, or about the dumps without a calibration that prevent it."""
    if method is Method.INDEPENDENT or not any(row.metric == CPU for row in rows):
        return []
    without = [dump for dump in dumps if CALIBRATION not in dump.metrics]
    if 0 < len(without) < len(dumps):
        have = f"{len(without)} of {len(dumps)} dumps {'has' if len(without) == 1 else 'have'}"
        return [f"cpu is not adjusted, since {have} no calibration (perf.calibrate)"]
    if found is None:
        return []
    change = 100 * (exp(fmean(found[1]) - fmean(found[0])) - 1)
    return [f"cpu is adjusted for the speed of the machine; its calibration takes {change:+.1f} % time"]


def judged(rows: list["Row"], quiet: float | None) -> tuple[list["Row"], list[str]]:
    """The rows without wall clocks that are noisier than `quiet`, and a note that names these.

    All rows if `quiet` is None, or if there is no processor time, which decides in their place.
    """
    if quiet is None or not any(row.metric == CPU for row in rows):
        return rows, []
    noises = {row.metric: max(row.base.noise or 0.0, row.new.noise or 0.0) for row in rows if _is_wall_clock(row)}
    busy = [name for name, noise in noises.items() if noise > quiet]
    if not busy:
        return rows, []
    note = (
        f"not judged, since the machine was not quiet (noise up to {max(noises[name] for name in busy):.1%}, "
        f"{quiet:.1%} is allowed): {', '.join(busy)}; cpu decides, which does not include waiting"
    )
    return [row for row in rows if row.metric not in busy], [note]


def _is_wall_clock(row: "Row") -> bool:
    return row.metric.partition(".")[0] in WALL_CLOCK
