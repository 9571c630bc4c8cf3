"""Numbers out of a perf dump: times with intervals, rates, peaks."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_gen.perf.clock import STAGES

TIMES = (*STAGES, "step", "total")  # "step" is one denoising step


MEMORY = {"peak_host_mb": "peak_host_anon_mb", "peak_device_mb": "peak_allocated_mb"}  # column -> field of a checkpoint


QUALITY = ("psnr", "ssim", "max_error")


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 97.5 %, 1 to 10 degrees


@dataclass(frozen=True)
class Measure:
    """The median of `repeats` observations and its 95 % interval; a single observation has none."""

    median: float
    low: float | None = None
    high: float | None = None
    repeats: int = 1


def measure(values: Sequence[float]) -> Measure:
    """Median and 95 % interval: Student's t times sqrt(pi/2) s / sqrt(n), a normal sample's error of the median."""
    median, degrees = statistics.median(values), len(values) - 1
    if degrees < 1:
        return Measure(median)
    t = _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.372 / degrees + 2.823 / degrees**2  # Cornish and Fisher
    half = t * math.sqrt(math.pi / 2) * statistics.stdev(values) / math.sqrt(len(values))
    return Measure(median, max(median - half, 0.0), median + half, len(values))


def times(dump: Mapping[str, Any]) -> dict[str, Measure]:
    """Seconds per stage, per denoising step (a generation's median step) and in total.

    Where the dump has `repeats`, these are the observations, each with `total_duration_ms`, `steps` and
    `denoise_steps_ms`; the dump's own times are the only observation otherwise, and of a stage that is not repeated.
    """
    found: dict[str, list[float]] = {}
    for each in dump.get("repeats") or [dump]:
        for stage in each.get("steps", ()):
            found.setdefault(stage["name"], []).append(stage["duration_ms"])
        if steps := [step["duration_ms"] for step in each.get("denoise_steps_ms", ())]:
            found.setdefault("step", []).append(statistics.median(steps))
        if "total_duration_ms" in each:
            found.setdefault("total", []).append(each["total_duration_ms"])
    for stage in dump.get("steps", ()):
        found.setdefault(stage["name"], [stage["duration_ms"]])
    return {name: measure([value / 1000 for value in values]) for name, values in found.items()}


def images_per_second(dump: Mapping[str, Any], images: int) -> Measure | None:
    """Images per second of each repeat, or the dump's own figure."""
    if repeats := [each["total_duration_ms"] for each in dump.get("repeats") or () if each.get("total_duration_ms")]:
        return measure([1000 * images / duration for duration in repeats])
    own = dump.get("images_per_second")
    return None if own is None else Measure(own)


def peak_memory(dump: Mapping[str, Any]) -> dict[str, float]:
    """The highest of all checkpoints, host and device, where the machine could tell."""
    checkpoints = (dump.get("memory_checkpoints") or {}).values()
    peaks = {column: [point[name] for point in checkpoints if point.get(name) is not None]
             for column, name in MEMORY.items()}  # fmt: skip
    return {column: max(values) for column, values in peaks.items() if values}
