"""Formats the report as text for a terminal and as JSON. Does not import torch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sglang_gen.config.schema import plain
from sglang_gen.debug.verdict import LEVEL, Report, Row, Verdict, worst

PARITY_REPORT_VERSION = 1
PARITY_EXIT_CODES = {Verdict.exact: 0, Verdict.equal: 0, Verdict.different: 1}
HEADER = ("stage", "native engine", "diffusers", "relative error", "verdict")
END_TO_END = "each step agrees if it starts from the same latents, so rounding accumulated over the steps"


def as_json(report: Report) -> dict[str, Any]:
    """All rows with their errors; errors that are not finite are null."""
    content: dict[str, Any] = plain(report)
    content["rows"] = [_row_as_json(row) for row in report.rows]
    first = None if report.first is None else _row_as_json(report.first)
    head = {"report_version": PARITY_REPORT_VERSION, "verdict": report.verdict.value, "first": first}
    return {**head, **content, "sentence": sentence(report), "exit_code": PARITY_EXIT_CODES[report.verdict]}


def _row_as_json(row: Row) -> dict[str, Any]:
    content: dict[str, Any] = {name: value for name, value in plain(row).items() if name != "outer"}
    finite = row.error is not None and math.isfinite(row.error)
    return {**content, "error": row.error if finite else None, "verdict": row.verdict.value}


def text(report: Report) -> str:
    """A table, the scope and tolerance of the comparison, and the verdict in the last line."""
    shown = [_with_inside(row, report.rows) for row in report.rows if row.outer or row is report.first]
    cells = [HEADER, *map(_cells, shown)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, "", _scope(report), sentence(report)])


def _with_inside(row: Row, rows: Sequence[Row]) -> Row:
    """The row of a module with the largest error and the worst verdict of the module and the modules inside it."""
    if row.stage not in ("network", "decoder") or not row.ours:
        return row
    alike = [other for other in rows if (other.stage, other.step) == (row.stage, row.step)]
    inside = [other for other in alike if other.ours.startswith(f"{row.ours}.")]
    error = max((other.error or 0.0 for other in [row, *inside]), default=0.0)
    return replace(row, error=error, verdict=worst(other.verdict for other in [row, *inside]))


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    stage = row.stage if row.step is None else f"step {row.step}, {row.stage}"
    verdict = row.verdict.value + (f" ({row.note})" if row.note else "")
    return stage, _name(row.ours), _name(row.theirs), _number(row.error), verdict


def _name(module: str) -> str:
    return module or "whole network"


def _number(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.2g}" if math.isfinite(error) else "not finite"


def _scope(report: Report) -> str:
    left_out = "" if not report.left_out else f"; {len(report.left_out)} have no counterpart"
    module, whole = report.tolerance.module, report.tolerance.whole
    limits = f"{module:g}" if module == whole else f"{module:g} for a module, {whole:g} for a whole network"
    images = "" if whole >= LEVEL else ", one level of 255 for images"
    return (
        f"{report.compared} of {report.modules} modules with weights were compared{left_out}. "
        f"Tolerance max|a-b| / max|b| in {report.dtype}: {limits}{images}."
    )


def sentence(report: Report) -> str:
    """The verdict, and the names and the error of the first difference."""
    first = report.first
    if first is None:
        largest = max((row.error or 0.0 for row in report.rows if row.theirs != "images"), default=0.0)
        return report.verdict.value + ("" if largest == 0 else f": at most {largest:.2g}")
    place = first.stage if first.step is None else f"step {first.step}, {first.stage}"
    by = first.note if first.error is None else f"by {_number(first.error)}"
    by = by if first.error is None or math.isfinite(first.error) else "is not finite"
    line = f"{report.verdict.value}: {place}, {_name(first.ours)} (diffusers: {_name(first.theirs)}) {by}"
    if report.cause is not None:
        inside = f"{_name(report.cause.ours)} (diffusers: {_name(report.cause.theirs)})"
        return f"{line}; its input differs already, so look inside {inside} before it"
    return f"{line}; {END_TO_END}" if first.stage == "end to end" and not first.note else line
