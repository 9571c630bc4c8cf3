"""Comparisons between the jobs of a sweep: the job that speed-ups refer to, and the speed-up of each."""

from collections.abc import Sequence

from sglang_gen.perf.dump_numbers import MEAN_STEP, Measure, speed_up
from sglang_gen.report.job_reader import Row

UNEVEN = 1.25  # ratio of mean and median step from which the steps of a job do not do the same work


def base_row(rows: Sequence[Row]) -> Row | None:
    """The first job with a step time."""
    return next((row for row in rows if row.status == "completed" and "step" in row.times), None)


def speed_ups(rows: Sequence[Row], name: str) -> list[Measure | None]:
    """How many times faster than the base each job is: the ratio of the medians of the time `name`."""
    base = base_row(rows)
    of = [row.times.get(name) for row in rows]
    if base is None or name not in base.times:
        return [None] * len(rows)
    return [
        None if item is None else Measure(1.0) if row is base else speed_up(base.times[name], item)
        for row, item in zip(rows, of, strict=True)
    ]


def is_mean_needed(rows: Sequence[Row]) -> bool:
    """Whether the median step of a job misleads: a step cache skips the work of some, or the steps differ anyway.

    Half of the steps decide the median. If more than half of them are nearly free, it hides what the others cost.
    """
    return any(_has_cache(row) or _is_uneven(row) for row in rows)


def _has_cache(row: Row) -> bool:
    return any(name.startswith("cache.") or (name == "cache" and value not in ("none", "null"))
               for name, value in row.effective.items())  # fmt: skip


def _is_uneven(row: Row) -> bool:
    step, mean = row.times.get("step"), row.times.get(MEAN_STEP)
    return bool(step and mean and step.median and not 1 / UNEVEN < mean.median / step.median < UNEVEN)
