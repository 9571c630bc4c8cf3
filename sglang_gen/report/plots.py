"""The plots of a report as Vega-Lite specifications, made with Altair.

Colours are CSS variables of the page, so that plots follow its light, dark and print styles. The name of a cell stands
above its bar instead of beside it, so that bars keep their width on a narrow screen.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_gen.perf.clock import STAGES
from sglang_gen.perf.dump_numbers import Measure, measure
from sglang_gen.report.cell_metrics import MEMORY_NAMES, Metrics, frontier
from sglang_gen.report.cells import Cell
from sglang_gen.report.conclusion import duration

INK, MUTED, RULE, ACCENT = "var(--ink)", "var(--muted)", "var(--rule)", "var(--accent)"
STAGE_COLOURS = {name: f"var(--stage-{index})" for index, name in enumerate(STAGES)}
DECISIONS = {"compute": "var(--accent)", "reuse": "var(--faint)"}  # colours of a step cache's decisions
MOST_BARS = 40  # cells in a bar chart
MOST_NAMES = 8  # points of a frontier that are labelled
BAND = 36  # height of a bar with its label, in pixels
LABEL_PIXELS = 190


@dataclass(frozen=True)
class Plot:
    """A plot with its title, a sentence below the title, and its Vega-Lite specification."""

    title: str
    note: str
    spec: dict[str, Any]
    wide: bool = False


def stage_plots(cells: Sequence[Cell]) -> list[Plot]:
    """One plot with all stages of a generation, and one per stage with its interval."""
    measured = [cell for cell in cells if any(name in cell.row.times for name in STAGES)][:MOST_BARS]
    if not measured:
        return []
    stages = [name for name in STAGES if any(name in cell.row.times for cell in measured)]
    timed = [name for name in stages if name not in ("load", "saving")]
    plots = []
    if len(timed) > 1:
        plots.append(Plot("Generation", "Medians of the stages, and the 95 % interval of their total.",
                          _stacked(measured, timed), wide=True))  # fmt: skip
    largest = max(cell.row.times[name].median for cell in measured for name in timed if name in cell.row.times)
    for name in stages:
        values = [cell.row.times[name].median for cell in measured if name in cell.row.times]
        if name in ("load", "denoising") or max(values) > 0.02 * largest:
            plots.append(Plot(_words(name).capitalize(), "", _bars(measured, name)))
    return plots


def _words(stage: str) -> str:
    return stage.replace("_", " ")


def _bars(cells: Sequence[Cell], stage: str) -> dict[str, Any]:
    import altair as alt

    measured = [(cell, cell.row.times[stage]) for cell in cells if stage in cell.row.times]
    factor, unit = _unit(item.median for _, item in measured)
    rows = [
        {"order": order, "cell": cell.label, "short": cell.short, "value": factor * item.median,
         **_interval(item, factor), "text": duration(item.median, item.low, item.high)}
        for order, (cell, item) in enumerate(measured)
    ]  # fmt: skip
    base = _banded(rows)
    bars = base.mark_bar(size=7, yOffset=8, color=ACCENT).encode(
        x=_times("value:Q", unit),
        tooltip=[alt.Tooltip("cell:N", title="cell"), alt.Tooltip("text:N", title=_words(stage))],
    )
    layers = [bars, _names(base), _numbers(base)]
    if any("low" in row for row in rows):
        layers.insert(1, _whiskers(base, unit))
    return _finished(alt.layer(*layers), BAND * len(rows))


def _stacked(cells: Sequence[Cell], stages: Sequence[str]) -> dict[str, Any]:
    import altair as alt

    parts, totals = [], []
    factor, unit = _unit(cell.row.times[name].median for cell in cells for name in stages if name in cell.row.times)
    for order, cell in enumerate(cells):
        start = 0.0
        for name in stages:
            if name in cell.row.times:
                median = cell.row.times[name].median
                end = start + median
                parts.append({"order": order, "cell": cell.label, "stage": _words(name),
                              "start": factor * start, "end": factor * end, "text": duration(median)})  # fmt: skip
                start = end
        total: dict[str, Any] = {"order": order, "cell": cell.label, "short": cell.short, "text": duration(start)}
        if cell.seconds:
            images = max(len(cell.row.dump.get("samples", ())), 1)
            whole = measure([images * value for value in cell.seconds])
            total["text"] = duration(whole.median, whole.low, whole.high)
            total |= _interval(whole, factor)
        totals.append(total)
    names = [_words(name) for name in stages]
    colours = [STAGE_COLOURS[name] for name in stages]
    bars = _banded(parts).mark_bar(size=9, yOffset=8).encode(
        x=_times("start:Q", unit),
        x2="end:Q",
        color=alt.Color("stage:N", scale=alt.Scale(domain=names, range=colours),
                        legend=alt.Legend(title=None, orient="top", columns=4, symbolType="square")),
        tooltip=[alt.Tooltip("cell:N", title="cell"), alt.Tooltip("stage:N", title="stage"),
                 alt.Tooltip("text:N", title="median")],
    )  # fmt: skip
    base = _banded(totals)
    layers = [bars, _names(base), _numbers(base)]
    if any("low" in row for row in totals):
        layers.insert(1, _whiskers(base, unit))
    return _finished(alt.layer(*layers), BAND * len(totals))


def _banded(rows: Sequence[dict[str, Any]]) -> Any:
    """A chart with a band per cell, in the order of the cells, without an axis."""
    import altair as alt

    return alt.Chart(alt.Data(values=list(rows))).encode(y=alt.Y("order:O", axis=None, scale=alt.Scale(padding=0)))


def _names(base: Any) -> Any:
    import altair as alt

    return base.mark_text(align="left", dy=-6, limit=LABEL_PIXELS, color=INK).encode(x=alt.value(0), text="short:N")


def _numbers(base: Any) -> Any:
    import altair as alt

    return base.mark_text(align="right", dy=-6, color=MUTED).encode(x=alt.value("width"), text="text:N")


def _whiskers(base: Any, unit: str) -> Any:
    return base.mark_rule(yOffset=8, color=INK, strokeWidth=1.25).encode(x=_times("low:Q", unit), x2="high:Q")


def _times(field: str, unit: str) -> Any:
    import altair as alt

    return alt.X(field, title=unit, axis=alt.Axis(tickCount=4))


def _unit(seconds: Iterable[float]) -> tuple[int, str]:
    """The unit of an axis for times in seconds, and the factor from seconds to it."""
    return (1, "seconds") if max(seconds) >= 1 else (1000, "milliseconds")


def _interval(item: Measure, factor: float) -> dict[str, float]:
    return {} if item.low is None or item.high is None else {"low": factor * item.low, "high": factor * item.high}


def quality_plot(found: Sequence[Metrics]) -> Plot | None:
    """Time against PSNR; None without two measured cells. Identical images are drawn above the highest PSNR."""
    rated = [one for one in found if one.time is not None and one.psnr is not None]
    finite = [one.psnr for one in rated if one.psnr is not None and math.isfinite(one.psnr)]
    if len(rated) < 2 or not finite:
        return None
    low, high = min(finite), max(finite)
    top = high + max(0.25 * (high - low), 3.0)
    factor, unit = _unit(one.time.median for one in rated if one.time is not None)
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
    factor, unit = _unit(one.time.median for one in rated if one.time is not None)
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
    return {"cell": one.cell.label, "short": one.cell.short, "x": factor * one.time.median, "time": text,
            **_interval(one.time, factor)}  # fmt: skip


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

    for index in chosen:
        rows[index]["frontier"] = True
    line = [rows[index] for index in chosen]
    axis = alt.Axis() if labels is None else alt.Axis(labelExpr=labels[0], values=labels[1])
    y = alt.Y("y:Q", title=titles[1], scale=alt.Scale(zero=False, padding=18), axis=axis)
    x = alt.X("x:Q", title=titles[0], scale=alt.Scale(zero=False, padding=18), axis=alt.Axis(tickCount=5))
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
        _point_names(best, line),
    ]
    return _finished(alt.layer(*layers), 300)


def _point_names(best: Any, line: Sequence[dict[str, Any]]) -> Any:
    """Names of the points on the frontier, if they are few."""
    shown = 1 if len(line) <= MOST_NAMES else 0
    return best.mark_text(align="left", dx=8, dy=-9, limit=160, color=INK, opacity=shown).encode(text="short:N")


def cache_plot(cells: Sequence[Cell]) -> Plot | None:
    """A strip of steps per cell with a step cache: which steps were computed and which were reused."""
    import altair as alt

    rows, names = [], []
    traced = [cell for cell in cells if (cell.row.dump.get("cache") or {}).get("steps")][:MOST_BARS]
    for order, cell in enumerate(traced):
        trace = cell.row.dump["cache"]
        changes = trace.get("residual_diffs") or {}
        steps = trace["steps"]
        reused = sum(decision == "reuse" for decision in steps)
        names.append(
            {"order": order, "cell": cell.label, "short": cell.short, "text": f"{reused} of {len(steps)} steps reused"}
        )
        for step, decision in enumerate(steps):
            change = changes.get(str(step))
            rows.append({"order": order, "cell": cell.label, "short": cell.short, "step": step,
                         "next": step + 1, "decision": str(decision),
                         "change": "not measured" if change is None else f"{change:.3g}"})  # fmt: skip
    if not rows:
        return None
    strips = _banded(rows).mark_bar(size=11, yOffset=8, stroke="var(--paper)", strokeWidth=1).encode(
        x=alt.X("step:Q", title="denoising step", axis=alt.Axis(tickMinStep=1, grid=False),
                scale=alt.Scale(nice=False)),
        x2="next:Q",
        color=alt.Color("decision:N", scale=alt.Scale(domain=list(DECISIONS), range=list(DECISIONS.values())),
                        legend=alt.Legend(title=None, orient="top", symbolType="square")),
        tooltip=[alt.Tooltip("cell:N", title="cell"), alt.Tooltip("step:Q"), alt.Tooltip("decision:N"),
                 alt.Tooltip("change:N", title="change of the residual")],
    )  # fmt: skip
    base = _banded(names)
    return Plot("Decisions", "", _finished(alt.layer(strips, _names(base), _numbers(base)), BAND * len(names)), True)


def _finished(chart: Any, height: Any) -> dict[str, Any]:
    """The specification of a chart that fills the width of its place on the page."""
    import altair as alt

    font = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
    axis: dict[str, Any] = {
        "labelColor": MUTED, "titleColor": MUTED, "gridColor": RULE, "domain": False, "ticks": False,
        "titleFontWeight": "normal", "titleFontSize": 11, "labelFontSize": 11, "labelPadding": 6,
    }  # fmt: skip
    chart = chart.properties(
        width="container", height=height, background="transparent",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    ).configure(
        font=font, view=alt.ViewConfig(stroke=None), axis=alt.AxisConfig(**axis), text=alt.MarkConfig(fontSize=11.5),
        legend=alt.LegendConfig(labelColor=MUTED, labelFontSize=11, symbolSize=80, padding=0, offset=8),
    )  # fmt: skip
    spec: dict[str, Any] = chart.to_dict()
    return spec
