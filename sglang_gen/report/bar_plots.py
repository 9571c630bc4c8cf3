"""Bar plots: the stages of a generation, and the decisions of a step cache.

The name of a cell stands above its bar instead of beside it, so that bars keep their width on a narrow screen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_gen.perf.clock import STAGES
from sglang_gen.perf.dump_numbers import measure
from sglang_gen.report.cells import Cell, without_middle
from sglang_gen.report.conclusion import duration
from sglang_gen.report.plots import ACCENT, INK, MUTED, Plot, finished, interval_of, unit_of

STAGE_COLOURS = {name: f"var(--stage-{index})" for index, name in enumerate(STAGES)}
# Colours of what a step cache decided for the images and guidance branches of a step.
DECISIONS = {"computed": "var(--accent)", "in part": "var(--half)", "reused": "var(--faint)"}
MOST_BARS = 32  # cells in a plot
BAND = 36  # height of a bar with its label, in pixels
LABEL_PIXELS, LABEL = 190, 30  # of the name of a cell, and its characters


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
    medians = [cell.row.times[name].median for cell in measured for name in timed if name in cell.row.times]
    largest = max(medians, default=0.0)
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
    factor, unit = unit_of(item.median for _, item in measured)
    rows = [
        {"order": order, "cell": cell.label, "short": cell.short, "value": factor * item.median,
         **interval_of(item, factor), "text": duration(item.median, item.low, item.high)}
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
    return finished(alt.layer(*layers), BAND * len(rows))


def _stacked(cells: Sequence[Cell], stages: Sequence[str]) -> dict[str, Any]:
    import altair as alt

    parts, totals = [], []
    factor, unit = unit_of(cell.row.times[name].median for cell in cells for name in stages if name in cell.row.times)
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
            images = max(len(cell.row.dump.get("samples") or ()), 1)
            whole = measure([images * value for value in cell.seconds])
            total["text"] = duration(whole.median, whole.low, whole.high)
            total |= interval_of(whole, factor)
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
    return finished(alt.layer(*layers), BAND * len(totals))


def cache_plot(cells: Sequence[Cell]) -> Plot | None:
    """A strip of steps per cell with a step cache: which steps were computed and which were reused."""
    import altair as alt

    rows, names = [], []
    traced = [cell for cell in cells if (cell.row.dump.get("cache") or {}).get("steps")][:MOST_BARS]
    for order, cell in enumerate(traced):
        steps = _decisions(cell.row.dump["cache"])
        names.append({"order": order, "cell": cell.label, "short": cell.short, "text": _reused(steps)})
        rows += [{"order": order, "cell": cell.label, "short": cell.short, **step} for step in steps]
    if not rows:
        return None
    colours = {name: colour for name, colour in DECISIONS.items() if any(row["decision"] == name for row in rows)}
    strips = _banded(rows).mark_bar(size=11, yOffset=8, stroke="var(--paper)", strokeWidth=1).encode(
        x=alt.X("step:Q", title="denoising step", axis=alt.Axis(tickMinStep=1, grid=False),
                scale=alt.Scale(nice=False)),
        x2="next:Q",
        color=alt.Color("decision:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())),
                        legend=alt.Legend(title=None, orient="top", symbolType="square")),
        tooltip=[alt.Tooltip("cell:N", title="cell"), alt.Tooltip("step:Q"), alt.Tooltip("decision:N"),
                 alt.Tooltip("share:N", title="reused"), alt.Tooltip("change:N", title="change of the residual")],
    )  # fmt: skip
    base = _banded(names)
    return Plot("Decisions", "", finished(alt.layer(strips, _names(base), _numbers(base)), BAND * len(names)), True)


def _decisions(cache: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the dump's `cache` says of each step, over all images and guidance branches."""
    short = [{"step": step, "decision": decision, "residual": (cache.get("residual_diffs") or {}).get(str(step))}
             for step, decision in enumerate(cache["steps"])]  # fmt: skip
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in cache.get("trace") or short:
        found.setdefault(row["step"], []).append(row)
    return [_step(step, rows) for step, rows in sorted(found.items())]


def _reused(steps: Sequence[Mapping[str, Any]]) -> str:
    whole = sum(step["decision"] == "reused" for step in steps)
    if any(step["decision"] == "in part" for step in steps):
        share = sum(step["reused"] for step in steps) / sum(step["count"] for step in steps)
        return f"{share:.0%} of {len(steps)} steps reused"
    return f"{whole} of {len(steps)} steps reused"


def _step(step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reused, count = sum(row["decision"] not in ("computed", "compute") for row in rows), len(rows)
    changes = sorted({f"{row['residual']:.3g}" for row in rows if row["residual"] is not None}, key=float)
    return {
        "step": step, "next": step + 1, "reused": reused, "count": count,
        "decision": "computed" if not reused else "reused" if reused == count else "in part",
        "share": f"{reused} of {count} images and guidance branches" if count > 1 else "yes" if reused else "no",
        "change": " to ".join(dict.fromkeys((changes[0], changes[-1]))) if changes else "not measured",
    }  # fmt: skip


def _banded(rows: Sequence[dict[str, Any]]) -> Any:
    """A chart with a band per cell, in the order of the cells, without an axis."""
    import altair as alt

    named = [row | {"short": without_middle(row["short"], LABEL)} if "short" in row else row for row in rows]
    return alt.Chart(alt.Data(values=named)).encode(y=alt.Y("order:O", axis=None, scale=alt.Scale(padding=0)))


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
