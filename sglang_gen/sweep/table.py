"""Tables of a sweep: table.csv has all columns as plain numbers, table.md and the terminal those that matter most."""

import csv
import io
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sglang_gen import files
from sglang_gen.perf.dump_numbers import ACCURACIES, MEAN_STEP, MEMORY, QUALITY, TIMES, Measure
from sglang_gen.report.job_reader import JOB_MARKS, Row, read_jobs
from sglang_gen.sweep.markdown import FILE_WIDTH, to_markdown
from sglang_gen.sweep.measured import speed_ups

_NONE = Row("", "")
LEAST_WIDTH = 40  # columns of a terminal; a narrower one wraps the lines


def _varying(rows: Sequence[Row]) -> list[str]:
    """Settings that differ between jobs, or whose requested and effective values differ."""
    ran = [row for row in rows if row.requested or row.effective]
    names = dict.fromkeys(name for row in ran for name in (*row.requested, *row.effective))

    def varies(name: str) -> bool:
        pairs = {(row.requested.get(name), row.effective.get(name)) for row in ran}
        return len(pairs) > 1 or any(None not in pair and len(set(pair)) > 1 for pair in pairs)

    return [name for name in names if varies(name)]


def to_csv(rows: Sequence[Row]) -> str:
    """The table for programs, with the same columns for every sweep except for the settings that vary."""
    settings = _varying(rows)
    ratios = zip(speed_ups(rows, "step"), speed_ups(rows, MEAN_STEP), strict=True)
    lines = [_csv_line(row, settings) | _added(row, *both) for row, both in zip(rows, ratios, strict=True)]
    used = {name for line in lines for name, value in line.items() if value not in (None, "")}
    header = [name for name in _csv_line(_NONE, settings) | _added(_NONE, None, None)
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
        "pictures": " ".join(row.outputs),
        "seconds": row.seconds,
        "repeats": max((item.repeats for item in row.times.values()), default=None),
    }
    measures = {f"{name}_s": row.times.get(name) for name in TIMES}
    measures |= {"images_per_second": row.images_per_second, "joules_per_image": row.joules_per_image}
    for name, item in measures.items():
        line |= _bounds(name, item)
    line |= {column: row.memory.get(column) for column in MEMORY}
    for name in settings:
        line |= {f"requested.{name}": row.requested.get(name), f"effective.{name}": row.effective.get(name)}
    return line | {name: row.quality.get(name) for name in QUALITY}


def _added(row: Row, speed_up: Measure | None, of_means: Measure | None) -> dict[str, Any]:
    """Columns of newer versions, after all others."""
    measures = {f"{MEAN_STEP}_s": row.times.get(MEAN_STEP), "speedup": speed_up, "speedup_mean": of_means}
    bounds = {column: value for name, item in measures.items() for column, value in _bounds(name, item).items()}
    marks = {mark: "true" if mark in row.marks else None for mark in JOB_MARKS}
    return bounds | marks | {name: row.quality.get(name) for name in ("verdict", *ACCURACIES)}


def _bounds(name: str, item: Measure | None) -> dict[str, float | None]:
    """The columns of a measure: its median and its interval."""
    values = (None, None, None) if item is None else (item.median, item.low, item.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(_rounded, values), strict=True))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def write_table(folder: Path) -> list[Path]:
    """Write `table.csv` and `table.md` of the sweep in `folder` atomically. Returns their paths; none without a job.

    Raises RunError.
    """
    rows = read_jobs(folder)
    if not rows:
        return []
    tables = {"table.csv": to_csv(rows), "table.md": to_markdown(rows, _title(folder))}
    for name, text in tables.items():
        files.save_bytes(folder / name, text.encode())
    return [folder / name for name in tables]


def print_table(folder: Path) -> None:
    """Print the table of the sweep in `folder` in the width of the terminal, or of table.md if there is none.

    A dry run has printed its own results, and a table of it has no numbers. Raises RunError.
    """
    rows = read_jobs(folder)
    if all(row.status == "planned" for row in rows):
        return
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    limit = shutil.get_terminal_size((FILE_WIDTH, 0)).columns if is_terminal else FILE_WIDTH
    files.print_result(to_markdown(rows, _title(folder), max(limit, LEAST_WIDTH)).rstrip("\n"))


def _title(folder: Path) -> str:
    return f"Sweep {folder.name}"
