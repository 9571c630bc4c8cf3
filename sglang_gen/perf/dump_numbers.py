"""Extracts numbers from a perf dump: times with confidence intervals, rates, memory peaks."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_gen.perf import attributes
from sglang_gen.perf.clock import STAGES
from sglang_gen.perf.log_ratio import quantile

TIMES = (*STAGES, "step", "total")  # "step" is the median denoising step of a generation
MEAN_STEP = "step_mean"  # the mean of its steps, which differs from the median if a cache skips the work of some


MEMORY = {"peak_host_mb": "peak_host_anon_mb", "peak_device_mb": "peak_allocated_mb"}  # column -> field of a checkpoint


QUALITY = ("psnr", "ssim", "max_error")
ACCURACIES = (attributes.ACCURACY, attributes.REFERENCE_ACCURACY)  # of models with attributes


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 97.5 %, 1 to 10 degrees


@dataclass(frozen=True)
class Measure:
    """The median of `repeats` observations and its 95 % confidence interval; None for a single observation."""

    median: float
    low: float | None = None
    high: float | None = None
    repeats: int = 1


def measure(values: Sequence[float]) -> Measure:
    """Median with its 95 % interval: Student's t times sqrt(pi/2) s / sqrt(n), the standard error of normal data."""
    median, degrees = statistics.median(values), len(values) - 1
    if degrees < 1:
        return Measure(median)
    half = _t(degrees) * math.sqrt(math.pi / 2) * statistics.stdev(values) / math.sqrt(len(values))
    return Measure(median, max(median - half, 0.0), median + half, len(values))


def _t(degrees: int) -> float:
    """Student's t, 97.5 %; beyond the table by Cornish and Fisher."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.372 / degrees + 2.823 / degrees**2


def speed_up(base: Measure, new: Measure) -> Measure:
    """The ratio base / new of two times, with Welch's interval for the difference of their logarithms.

    The relative standard errors of the medians are those of `measure`. The ratio has no interval if either side is a
    single observation.
    """
    ratio = base.median / new.median if new.median else math.inf
    relative = [_relative_variance(side) for side in (base, new)]
    if None in relative or not 0 < ratio < math.inf:
        return Measure(ratio)
    u, v = (value for value in relative if value is not None)
    below = u**2 / (base.repeats - 1) + v**2 / (new.repeats - 1)
    half = quantile(0.975, (u + v) ** 2 / below) * math.sqrt(u + v) if below else 0.0
    factor = math.exp(min(half, 50.0))
    return Measure(ratio, ratio / factor, ratio * factor, min(base.repeats, new.repeats))


def _relative_variance(item: Measure) -> float | None:
    """Squared standard error of a median, relative to it; None for a single observation."""
    if item.high is None or not item.median:
        return None
    return ((item.high - item.median) / (_t(item.repeats - 1) * item.median)) ** 2


def times(dump: Mapping[str, Any]) -> dict[str, Measure]:
    """Seconds per stage, per denoising step (the median and the mean of a generation's steps) and in total.

    If the dump has `repeats`, these are the observations, each with `total_duration_ms`, `steps` and
    `denoise_steps_ms`; otherwise, and for stages that are not repeated, the dump's own times are the only observation.
    """
    observations: dict[str, list[float]] = {}
    for repeat in dump.get("repeats") or [dump]:
        for stage in repeat.get("steps", ()):
            observations.setdefault(stage["name"], []).append(stage["duration_ms"])
        if steps := [step["duration_ms"] for step in repeat.get("denoise_steps_ms", ())]:
            observations.setdefault("step", []).append(statistics.median(steps))
            observations.setdefault(MEAN_STEP, []).append(statistics.fmean(steps))
        if "total_duration_ms" in repeat:
            observations.setdefault("total", []).append(repeat["total_duration_ms"])
    for stage in dump.get("steps", ()):
        observations.setdefault(stage["name"], [stage["duration_ms"]])
    return {name: measure([value / 1000 for value in values]) for name, values in observations.items()}


def images_per_second(dump: Mapping[str, Any], images: int) -> Measure | None:
    """Images per second over the repeats, or the dump's own value."""
    totals = [repeat["total_duration_ms"] for repeat in dump.get("repeats") or () if repeat.get("total_duration_ms")]
    if totals:
        return measure([1000 * images / total for total in totals])
    own = dump.get("images_per_second")
    return None if own is None else Measure(own)


def energy_per_image(dump: Mapping[str, Any]) -> Measure | None:
    """Joules per sample over the repeats; None where the machine did not tell."""
    joules = [repeat["energy_j"] for repeat in dump.get("repeats") or () if repeat.get("energy_j")]
    return measure([value / len(dump["samples"]) for value in joules]) if joules else None


def peak_memory(dump: Mapping[str, Any]) -> dict[str, float]:
    """The highest host and device memory in MB, as far as it was measured: of all stages, and of the rank with most.

    The checkpoints are those of rank 0.
    """
    points = [*(dump.get("memory_checkpoints") or {}).values(), *(dump.get("ranks") or ())]
    peaks = {column: [point[name] for point in points if point.get(name) is not None]
             for column, name in MEMORY.items()}  # fmt: skip
    return {column: max(values) for column, values in peaks.items() if values}
