"""A sweep's folder as a table: one row per job, from what each job left behind. Pure functions, without Hydra.

`read_jobs(folder)` gives the rows, `to_csv` every column of them with bare numbers, `to_markdown` the columns that say
something, with intervals and pictures.
"""

import csv
import io
import json
import math
import os
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sglang_gen import output
from sglang_gen.errors import RunError, first_line
from sglang_gen.perf.record import STAGES

NOTE, DUMP = "job.json", "perf.json"  # what a job leaves beside its pictures
TIMES = (*STAGES, "step", "total")  # "step" is one denoising step
MEMORY = {"peak_host_mb": "peak_host_anon_mb", "peak_device_mb": "peak_allocated_mb"}  # column -> field of a checkpoint
QUALITY = ("psnr", "ssim")
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
    dump, missing = _read(place / note.get("dump", DUMP))
    if not problem and note.get("files"):
        problem = missing  # pictures without a dump; a failed job and a dry run have neither
    samples = dump.get("samples", [])
    files = note.get("files") or dict.fromkeys(sample["file"] for sample in samples if "file" in sample)
    return Row(
        job=place.name,
        status=note.get("status", "unfinished"),
        overrides=tuple(note.get("overrides", ())),
        error=note.get("error") or problem,
        seconds=note.get("seconds"),
        pictures=tuple(f"{place.name}/{name}" for name in files if (place / name).exists()),
        times=times(dump),
        images_per_second=_rate(dump, len(samples)),
        memory=peak_memory(dump),
        requested=_leaves(dump.get("requested") or {}),
        effective=_leaves(dump.get("effective") or {}),
        quality={name: value for name, value in (dump.get("quality") or {}).items() if name in QUALITY},
    )


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The JSON object in a file, or an empty one and the sentence that says why."""
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


def _telling(rows: Sequence[Row]) -> list[str]:
    """Settings that differ between jobs, or between what was requested and what took effect."""
    ran = [row for row in rows if row.requested or row.effective]
    names = dict.fromkeys(name for row in ran for name in (*row.requested, *row.effective))

    def tells(name: str) -> bool:
        pairs = {(row.requested.get(name), row.effective.get(name)) for row in ran}
        return len(pairs) > 1 or any(None not in pair and len(set(pair)) > 1 for pair in pairs)

    return [name for name in names if tells(name)]


def to_csv(rows: Sequence[Row]) -> str:
    """The table for programs: the same columns for every sweep, but for the settings that tell its jobs apart."""
    settings = _telling(rows)
    lines = [_csv_line(row, settings) for row in rows]
    used = {name for line in lines for name, value in line.items() if value not in (None, "")}
    header = [name for name in _csv_line(Row("", ""), settings)
              if name in used or not name.startswith(("requested.", "effective."))]  # fmt: skip
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_line(row: Row, settings: Iterable[str]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "job": row.job,
        "overrides": shlex.join(row.overrides),
        "status": row.status,
        "error": row.error,
        "pictures": " ".join(row.pictures),
        "seconds": row.seconds,
        "repeats": max((item.repeats for item in row.times.values()), default=None),
    }
    measures = {f"{name}_s": row.times.get(name) for name in TIMES} | {"images_per_second": row.images_per_second}
    for name, item in measures.items():
        line |= {name: item and _rounded(item.median), f"{name}_low": item and _rounded(item.low),
                 f"{name}_high": item and _rounded(item.high)}  # fmt: skip
    line |= {column: row.memory.get(column) for column in MEMORY}
    for name in settings:
        line |= {f"requested.{name}": row.requested.get(name), f"effective.{name}": row.effective.get(name)}
    return line | {name: row.quality.get(name) for name in QUALITY}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def to_markdown(rows: Sequence[Row], title: str = "Sweep") -> str:
    """The table for readers: columns that are empty in every row and overrides that all jobs share are left out."""
    shared = [word for word in rows[0].overrides if all(word in row.overrides for row in rows)] if len(rows) > 1 else []
    done = sum(row.status == "completed" for row in rows)
    lines = [f"# {title}", "", f"{done} of {len(rows)} jobs completed."]
    if shared:
        lines += [f"All jobs: {_code(shlex.join(shared))}."]
    lines += [
        "Times are seconds, memory is in 2^20 bytes. A median of several repeats is followed by its 95 % interval.",
        "",
    ]
    settings = _telling(rows)
    cells = [_markdown_line(row, settings, shared) for row in rows]
    header = [name for name in (cells[0] if cells else ()) if any(line[name] for line in cells)]
    table = [header, ["---"] * len(header), *([line[name] for name in header] for line in cells)]
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in table)]) + "\n"


def _markdown_line(row: Row, settings: Iterable[str], shared: Sequence[str]) -> dict[str, str]:
    own = [word for word in row.overrides if word not in shared]
    return {
        "job": row.job,
        "overrides": _code(shlex.join(own)) if own else "",
        "status": row.status if not row.error else f"{row.status}: {_escaped(row.error)}",
        "pictures": " ".join(map(_link, row.pictures)),
        **{name: _interval(row.times.get(name)) for name in TIMES},
        "images per second": _interval(row.images_per_second),
        **{column.removesuffix("_mb").replace("_", " "): _number(row.memory.get(column)) for column in MEMORY},
        **{name: _escaped(_change(row.requested.get(name), row.effective.get(name))) for name in settings},
        **{name: _number(row.quality.get(name)) for name in QUALITY},
    }


def _interval(item: Measure | None) -> str:
    if item is None or item.low is None:
        return _number(item and item.median)
    return f"{_number(item.median)} ({_number(item.low)} to {_number(item.high)}, n = {item.repeats})"


def _number(value: Any) -> str:
    """Four significant digits, never in powers of ten where the number is large."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value)


def _change(requested: str | None, effective: str | None) -> str:
    return f"{requested} → {effective}" if None not in (requested, effective) and requested != effective else (
        effective or requested or "")  # fmt: skip


def _code(text: str) -> str:
    """Code in a table's cell: a vertical bar still needs its backslash there."""
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", " ".join(text.split()))


def _link(path: str) -> str:
    picture = path.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif"))
    return f"{'!' if picture else ''}[{_escaped(path)}]({quote(path)})"


def write_table(folder: Path) -> list[Path]:
    """Write `table.csv` and `table.md` of the sweep in `folder`, each whole or not at all. Raises RunError."""
    rows = read_jobs(folder)
    tables = {"table.csv": to_csv(rows), "table.md": to_markdown(rows, f"Sweep {folder.name}")}
    for name, text in tables.items():
        save_text(folder / name, text)
    return [folder / name for name in tables]


def save_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises RunError with one sentence when the file cannot be written."""
    try:
        with output._temporary(path.parent, path.suffix) as temporary:
            output._fill(temporary, lambda file: file.write(text.encode()))
            os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
