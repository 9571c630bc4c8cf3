"""The jobs of a sweep, one `Row` each, from what each job left behind. Pure functions, without Hydra."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_gen.errors import first_line
from sglang_gen.perf.record import STAGES

NOTE, DUMP = "job.json", "perf.json"  # what a job leaves beside its pictures
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


@dataclass(frozen=True)
class Row:
    """One job. `times` are seconds, `memory` is in 2**20 bytes, `pictures` are relative to the sweep's folder."""

    job: str
    status: str
    overrides: tuple[str, ...] = ()
    error: str | None = None
    seconds: float | None = None
    pictures: tuple[str, ...] = ()
    times: Mapping[str, Measure] = field(default_factory=dict)
    images_per_second: Measure | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    requested: Mapping[str, str] = field(default_factory=dict)  # `parallel.tp_size` -> "2"
    effective: Mapping[str, str] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)


def read_jobs(folder: Path) -> list[Row]:
    """One row per job folder of the sweep in `folder`, in the order of the jobs; a failed job's row has its reason."""
    places = [
        place for place in folder.iterdir() if (place / NOTE).exists() or (place.is_dir() and place.name.isdigit())
    ]
    places.sort(
        key=lambda place: (not place.name.isdigit(), int(place.name) if place.name.isdigit() else 0, place.name)
    )
    return [_read_job(place) for place in places]


def _read_job(place: Path) -> Row:
    note, problem = _read(place / NOTE)
    status: str = note.get("status", "unfinished")
    dump: dict[str, Any] = {}
    if status == "completed":  # what lies in the folder of any other job is an earlier one's
        dump, missing = _read(place / note.get("dump", DUMP))
        problem = missing if note.get("files") else problem
    samples = dump.get("samples", [])
    return Row(
        job=place.name,
        status=status,
        overrides=tuple(note.get("overrides", ())),
        error=note.get("error") or problem,
        seconds=note.get("seconds"),
        pictures=tuple(f"{place.name}/{name}" for name in note.get("files", ()) if (place / name).exists()),
        times=times(dump),
        images_per_second=_rate(dump, len(samples)),
        memory=peak_memory(dump),
        requested=_leaves(dump.get("requested") or {}),
        effective=_leaves(dump.get("effective") or {}),
        quality={name: value for name, value in (dump.get("quality") or {}).items() if name in (*QUALITY, "identical")},
    )


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The JSON object in a file, or an empty one and the sentence that says why."""
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        return {}, f"{path.name} is no regular file"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read: {first_line(error)}"
    return (content, None) if isinstance(content, dict) else ({}, f"{path.name} is not a JSON object")


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


def _rate(dump: Mapping[str, Any], images: int) -> Measure | None:
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


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as one level: `{"parallel": {"tp": 2}}` -> `{"parallel.tp": "2"}`."""
    if isinstance(value, Mapping):
        return {path: text for name, item in value.items() for path, text in _leaves(item, f"{prefix}.{name}").items()}
    return {prefix.lstrip("."): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
