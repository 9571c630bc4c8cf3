"""Tables of a sweep: `to_csv` has all columns as plain numbers, `to_markdown` the columns and units for readers."""

import csv
import io
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sglang_gen import files, log
from sglang_gen.perf.dump_numbers import MEMORY, QUALITY, TIMES, Measure
from sglang_gen.report.job_reader import Row, read_jobs


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
        "pictures": " ".join(row.outputs),
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
    """The table for readers. Settings that all jobs share are listed above it; empty columns are left out."""
    shared = [word for word in rows[0].overrides if all(word in row.overrides for row in rows)] if len(rows) > 1 else []
    done, planned = (sum(row.status == status for row in rows) for status in ("completed", "planned"))
    dry = f", {planned} planned without running" if planned else ""
    lines = [f"# {title}", "", f"{done} of {len(rows)} jobs completed{dry}."]
    if shared:
        lines += [f"All jobs: {_code(shlex.join(shared))}."]
    settings = _varying(rows)
    same = {name: words for name in settings if (words := _same(rows, name)) is not None}
    if same:
        lines += [f"In all jobs that ran: {', '.join(f'{name} {_escaped(words)}' for name, words in same.items())}."]
    lines += [
        "Times are seconds (`whole job` with imports, loading and warm-up), memory is in 2^20 bytes. "
        "A median of several repeats is followed by its 95 % interval.",
        "",
    ]
    settings = [name for name in settings if name not in same]
    cells = [_markdown_line(row, settings, shared) for row in rows]
    header = [name for name in (cells[0] if cells else ()) if any(line[name] for line in cells)]
    table = [header, ["---"] * len(header), *([line[name] for name in header] for line in cells)]
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in table)]) + "\n"


def _same(rows: Sequence[Row], name: str) -> str | None:
    """The value of a setting, as text, if all jobs that have the setting agree; else None.

    For example, a job with cache=none has no setting `cache.Fn_compute_blocks`.
    """
    parents = [name[:place] for place, letter in enumerate(name) if letter == "."]
    having = [
        row
        for row in rows
        if (row.requested or row.effective) and not any(parent in row.effective for parent in parents)
    ]
    words = {_change(row.requested.get(name), row.effective.get(name)) for row in having}
    return words.pop() if len(words) == 1 and len(rows) > 1 else None


def _markdown_line(row: Row, settings: Iterable[str], shared: Sequence[str]) -> dict[str, str]:
    own = [word for word in row.overrides if word not in shared]
    return {
        "job": row.job,
        "overrides": _code(shlex.join(own)) if own else "",
        "status": row.status if not row.error else f"{row.status}: {_escaped(row.error)}",
        "pictures": " ".join(map(_link, row.outputs)),
        "whole job": _number(row.seconds),
        **{name.replace("_", " "): _interval(row.times.get(name)) for name in TIMES},
        "images per second": _interval(row.images_per_second),
        **{column.removesuffix("_mb").replace("_", " "): _number(row.memory.get(column)) for column in MEMORY},
        **{name: _escaped(_change(row.requested.get(name), row.effective.get(name))) for name in settings},
        **{name.replace("_", " "): _quality(row, name) for name in QUALITY},
    }


def _quality(row: Row, name: str) -> str:
    """A quality metric as text. Identical images have an infinite PSNR, which JSON cannot represent."""
    return "identical" if name == "psnr" and row.quality.get("identical") else _number(row.quality.get(name))


def _interval(item: Measure | None) -> str:
    if item is None or item.low is None:
        return _number(item and item.median)
    return f"{_number(item.median)} ({_number(item.low)} to {_number(item.high)}, n = {item.repeats})"


def _number(value: Any) -> str:
    """The number with four significant digits, without exponent for large numbers."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value)


def _change(requested: str | None, effective: str | None) -> str:
    return f"{requested} → {effective}" if None not in (requested, effective) and requested != effective else (
        effective or requested or "")  # fmt: skip


def _code(text: str) -> str:
    """Markdown code for a table cell, in which a vertical bar needs a backslash."""
    text = log.visible(" ".join(text.split())).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", log.visible(" ".join(text.split())))


def _link(path: str) -> str:
    is_image = path.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif"))
    return f"{'!' if is_image else ''}[{_escaped(path)}]({quote(path)})"


def write_table(folder: Path) -> list[Path]:
    """Write `table.csv` and `table.md` of the sweep in `folder` atomically. Raises RunError."""
    rows = read_jobs(folder)
    tables = {"table.csv": to_csv(rows), "table.md": to_markdown(rows, f"Sweep {folder.name}")}
    for name, text in tables.items():
        files.save_bytes(folder / name, text.encode())
    return [folder / name for name in tables]
