"""Scatter plots of time against quality and memory, with the frontier of the cells that no other cell beats."""

import math
from collections.abc import Sequence
from typing import Any

from sglang_gen.report.cell_metrics import MEMORY_NAMES, Metrics, frontier
from sglang_gen.report.cells import without_middle
from sglang_gen.report.conclusion import duration
from sglang_gen.report.plots import ACCENT, INK, MUTED, Plot, finished, interval_of, unit_of

MOST_NAMES, NAME = 8, 24  # points of a frontier that are labelled, and characters of a label
WIDE = 8.0  # ratio of the longest to the shortest time from which the axis is logarithmic


def quality_plot(found: Sequence[Metrics]) -> Plot | None:
    """Time against PSNR; None without two measured cells. Identical images are drawn above the highest PSNR."""
    rated = [one for one in found if one.time is not None and one.psnr is not None]
    finite = [one.psnr for one in rated if one.psnr is not None and math.isfinite(one.psnr)]
    if len(rated) < 2 or not finite:
        return None
    low, high = min(finite), max(finite)
    top = high + max(0.25 * (high - low), 3.0)
    factor, unit = unit_of(one.time.median for one in rated if one.time is not None)
    rows = [
        {**_point(one, factor), "y": top if math.isinf(psnr) else psnr,
         "quality": "identical" if math.isinf(psnr) else f"{psnr:.2f} dB",
         "ssim": "" if one.ssim is None else f"{one.ssim:.4f}"}
        for one in rated if (psnr := one.psnr) is not None
    ]  # fmt: skip
    exact = any(math.isinf(psnr) for one in rated if (psnr := one.psnr) is not None)
    chosen = frontier([(row["x"], -row["y"]) for row in rows])
    label = f"datum.value > {high} ? 'identical' : datum.label"
    ticks = _ticks(low, high) + ([top] if exact else [])
    note, titles = "Up and to the left is better.", (f"{unit} per image", "PSNR against the reference, dB")
    fields = {"quality": "PSNR", "ssim": "SSIM"}
    return Plot("Time and quality", note, _scatter(rows, chosen, titles, (label, ticks), fields))


def memory_plot(found: Sequence[Metrics], column: str | None) -> Plot | None:
    """Time against peak memory; None without two measured cells."""
    rated = [one for one in found if one.time is not None and one.memory is not None]
    if len(rated) < 2 or column is None:
        return None
    factor, unit = unit_of(one.time.median for one in rated if one.time is not None)
    rows = [{**_point(one, factor), "y": one.memory, "memory": f"{one.memory:.0f} MiB"} for one in rated]
    chosen = frontier([(row["x"], row["y"]) for row in rows])
    title = f"peak {MEMORY_NAMES[column]}, MiB"
    note = "Down and to the left is better."
    return Plot(
        "Time and memory", note, _scatter(rows, chosen, (f"{unit} per image", title), None, {"memory": "memory"})
    )


def _point(one: Metrics, factor: float) -> dict[str, Any]:
    assert one.time is not None
    text = duration(one.time.median, one.time.low, one.time.high)
    short = without_middle(one.cell.short, NAME)
    return {"cell": one.cell.label, "short": short, "x": factor * one.time.median, "time": text,
            **interval_of(one.time, factor)}  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    """Four or five round numbers that cover the interval."""
    step = 10 ** math.floor(math.log10(max(high - low, 0.1)))
    step = next(step * factor for factor in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step)
    return [round(index * step, 6) for index in range(first, math.floor(high / step) + 1)] or [round(low, 1)]


def _scatter(
    rows: list[dict[str, Any]],
    chosen: Sequence[int],
    titles: tuple[str, str],
    labels: tuple[str, list[float]] | None,
    fields: dict[str, str],
) -> dict[str, Any]:
    """Points with intervals of time, a step line through the frontier, and names of its points."""
    import altair as alt

    least, most = min(row["x"] for row in rows), max(row["x"] for row in rows)
    is_wide = 0 < WIDE * least < most  # one slow cell would leave the others in a corner
    if is_wide:  # a logarithmic axis has no place for an interval that begins at 0
        rows = [row | {"low": max(row["low"], least / 2)} if "low" in row else row for row in rows]
    middle = math.sqrt(least * most) if is_wide else (least + most) / 2
    for index in chosen:
        rows[index]["frontier"] = True
    line = [rows[index] for index in chosen]
    axis = alt.Axis() if labels is None else alt.Axis(labelExpr=labels[0], values=labels[1])
    y = alt.Y("y:Q", title=titles[1], scale=alt.Scale(zero=False, padding=18), axis=axis)
    scale = alt.Scale(type="log", nice=False, padding=18) if is_wide else alt.Scale(zero=False, padding=18)
    ticks = alt.Axis(values=_powers(least, most)) if is_wide else alt.Axis(tickCount=5)
    x = alt.X("x:Q", title=titles[0] + " (logarithmic)" * is_wide, scale=scale, axis=ticks)
    base = alt.Chart(alt.Data(values=rows)).encode(y=y)
    best = alt.Chart(alt.Data(values=line)).encode(x=x, y=y)
    tooltip = [alt.Tooltip("cell:N", title="cell"), alt.Tooltip("time:N", title="time per image")]
    tooltip += [alt.Tooltip(f"{name}:N", title=text) for name, text in fields.items()]
    layers = [best.mark_line(interpolate="step-after", color=ACCENT, strokeWidth=1.5)] if len(line) > 1 else []
    if any("low" in row for row in rows):
        layers.append(base.transform_filter("isValid(datum.low)").mark_rule(color=MUTED, opacity=0.5)
                      .encode(x=alt.X("low:Q"), x2="high:Q"))  # fmt: skip
    others = alt.value("var(--paper)")
    layers += [
        base.mark_point(size=70, filled=True, opacity=1, strokeWidth=1.5, stroke=ACCENT).encode(
            x=x, tooltip=tooltip, fill=alt.condition("datum.frontier", alt.value(ACCENT), others)
        ),
        *_point_names(_told_apart(line, rows, is_wide), middle, {"x": x, "y": y}),
    ]
    return finished(alt.layer(*layers), 300)


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two times."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [round(factor * 10.0**exponent, 9) for exponent in exponents for factor in (1, 2, 5)
            if low <= factor * 10.0**exponent <= high]  # fmt: skip


def _told_apart(line: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], is_wide: bool) -> list[dict[str, Any]]:
    """The points of a line whose names do not cover one another; a name is a third as wide as a plot."""

    def places(name: str, is_log: bool) -> list[float]:
        values = [math.log(row[name]) if is_log else row[name] for row in (*line, *rows)]
        return [(value - min(values)) / (max(values) - min(values) or 1.0) for value in values]

    kept: list[int] = []
    across, up = places("x", is_wide), places("y", False)
    for index in range(len(line)):
        if not any(abs(across[index] - across[one]) < 1 / 3 and abs(up[index] - up[one]) < 0.05 for one in kept):
            kept.append(index)
    return [line[index] for index in kept]


def _point_names(line: Sequence[dict[str, Any]], middle: float, position: dict[str, Any]) -> list[Any]:
    """Names of the points on the frontier, if they are few; on the left of a point in the right half."""
    import altair as alt

    sides = {"left": [row for row in line if row["x"] <= middle], "right": [row for row in line if row["x"] > middle]}
    return [
        alt.Chart(alt.Data(values=rows))
        .mark_text(align=align, dx=8 if align == "left" else -8, dy=-9, limit=160, color=INK)
        .encode(**position, text="short:N")
        for align, rows in sides.items()
        if rows and len(line) <= MOST_NAMES
    ]
