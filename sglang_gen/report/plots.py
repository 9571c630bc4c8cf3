"""What the plots of a report share. They are Vega-Lite specifications, made with Altair.

Colours are CSS variables of the page, so that plots follow its light, dark and print styles.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_gen.perf.dump_numbers import Measure

INK, MUTED, RULE, ACCENT = "var(--ink)", "var(--muted)", "var(--rule)", "var(--accent)"


@dataclass(frozen=True)
class Plot:
    """A plot with its title, a sentence below the title, and its Vega-Lite specification."""

    title: str
    note: str
    spec: dict[str, Any]
    wide: bool = False


def unit_of(seconds: Iterable[float]) -> tuple[int, str]:
    """The unit of an axis for times in seconds, and the factor from seconds to it."""
    return (1, "seconds") if max(seconds) >= 1 else (1000, "milliseconds")


def interval_of(item: Measure, factor: float) -> dict[str, float]:
    return {} if item.low is None or item.high is None else {"low": factor * item.low, "high": factor * item.high}


def finished(chart: Any, height: float) -> dict[str, Any]:
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
    spec: dict[str, Any] = chart.to_dict(validate=False)  # half of the time; the tests validate
    return spec
