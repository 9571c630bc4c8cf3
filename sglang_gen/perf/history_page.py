"""The report of `sglang perf history` as one HTML page: a plot of each metric as inline SVG, without scripts."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from sglang_gen import env, log
from sglang_gen.perf.change_points import FEW_COMMITS
from sglang_gen.perf.compare_markdown import share
from sglang_gen.perf.history import History, Series
from sglang_gen.perf.history_markdown import TOO_FEW, certainty, interval, percent
from sglang_gen.perf.statistics import Verdict, geometric_mean

WIDTH, HEIGHT = 860, 190
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 26, 30  # margins of a plot
CSS = """
:root { color-scheme: light dark; --ink: #1c1c1e; --muted: #6e6e73; --line: #d2d2d7; --page: #fff; --accent: #0a64c8;
  --worse: #c0392b; --better: #1e8449; }
@media (prefers-color-scheme: dark) { :root { --ink: #f2f2f4; --muted: #98989d; --line: #3a3a3c; --page: #1c1c1e;
  --accent: #64a8ff; --worse: #ff7b6b; --better: #5fd38a; } }
body { margin: 2rem auto; max-width: 900px; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h2 { margin-top: 2.5rem; font-size: 1.2rem; } h3 { margin: 1.5rem 0 0; font-size: 1rem; }
.muted { color: var(--muted); }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line);
  text-align: left; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.grid { stroke: var(--line); } .dot { fill: var(--accent); } .level { stroke: var(--ink); stroke-width: 2; }
.worse { stroke: var(--worse); } .better { stroke: var(--better); } svg text.worse, svg text.better { stroke: none; }
svg text.worse, td.worse { fill: var(--worse); color: var(--worse); }
svg text.better, td.better { fill: var(--better); color: var(--better); }
.change { stroke-dasharray: 3 3; }
"""
CLASSES = {Verdict.REGRESSION: "worse", Verdict.IMPROVEMENT: "better"}


def page(histories: Sequence[History], confidence: float) -> str:
    """The page, which needs no other file."""
    body = "\n".join(line for history in histories for line in _section(history, confidence))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Performance history</title>
<style>{CSS}</style>
</head>
<body>
<h1>Performance history</h1>
<p class="muted">Points are commits in the order of time, the geometric means of their dumps. Lines are the levels
between changes. A change is shown if its {share(confidence)} interval, which allows for the number of commits, lies
beyond the tolerance.</p>
{body}
<p class="muted">Written by sglang-gen {escape(env.VERSION)}.</p>
</body>
</html>
"""


def _section(history: History, confidence: float) -> Iterator[str]:
    dumps = sum(commit.dumps for commit in history.commits)
    yield f"<h2>{_text(history.model)}, {_text(history.prompt)}</h2>"
    yield (
        f'<p class="muted">{_text(history.machine)}, {log.quantity(dumps, "dump")} of '
        f"{log.quantity(len(history.commits), 'commit')}, fingerprint "
        f"{_text(history.fingerprint or 'absent')}</p>"
    )
    if 1 < len(history.commits) < FEW_COMMITS:
        yield f'<p class="muted">{TOO_FEW}</p>'
    yield from _changes(history, confidence)
    for series in history.series:
        if series.values:
            yield f"<h3>{_text(series.metric)}, {series.unit}</h3>"
            yield from _plot(history, series)


def _changes(history: History, confidence: float) -> Iterator[str]:
    changes = [(series, change) for series in history.series for change in series.changes]
    if not changes:
        yield "<p>No metric changed.</p>"
        return
    yield "<table><thead><tr><th>metric</th><th>commit</th><th>date</th><th>change</th>"
    yield f"<th>{share(confidence)} interval</th><th>confidence</th></tr></thead><tbody>"
    for series, change in changes:
        commit = history.commits[series.commits[change.index]]
        yield (
            f"<tr><td>{_text(series.metric)}</td><td><code>{_text(commit.short)}</code></td><td>{commit.date[:10]}</td>"
            f'<td class="{CLASSES[change.verdict]}">{percent(change.ratio)}</td><td>{interval(change)}</td>'
            f"<td>{certainty(change)}</td></tr>"
        )
    yield "</tbody></table>"


def _text(value: object) -> str:
    return escape(log.visible(" ".join(str(value).split())[:200]))


def _plot(history: History, series: Series) -> Iterator[str]:
    """Points at the commits of the series, the level of each segment, and a vertical line at each change."""
    values, last = series.values, max(len(history.commits) - 1, 1)
    low, high = _span(values)

    def x(index: float) -> float:
        return round(LEFT + index / last * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(series.metric)} at each commit">'
    for tick in _ticks(low, high):
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
        yield f'<text x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:.6g}</text>'
    bounds = [0, *(change.index for change in series.changes), len(values)]
    for start, end in pairwise(bounds):
        level = y(geometric_mean(values[start:end]))
        left, right = x(series.commits[start]), x(series.commits[end - 1])
        yield f'<line class="level" x1="{left - 3}" x2="{right + 3}" y1="{level}" y2="{level}"/>'
    for change in series.changes:
        commit, kind = series.commits[change.index], CLASSES[change.verdict]
        place, label = x(commit - 0.5), f"{percent(change.ratio)} {_text(history.commits[commit].short)}"
        yield f'<line class="change {kind}" x1="{place}" x2="{place}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        anchor = "end" if place > WIDTH * 0.75 else "start"
        yield f'<text class="{kind}" x="{place}" y="{TOP - 10}" text-anchor="{anchor}">{label}</text>'
    for index, value in zip(series.commits, values, strict=True):
        commit_ = history.commits[index]
        count = log.quantity(commit_.dumps, "dump")
        title = f"{_text(commit_.short)}, {commit_.date[:10]}: {value:.6g} {series.unit} ({count})"
        yield f'<circle class="dot" cx="{x(index)}" cy="{y(value)}" r="3.5"><title>{title}</title></circle>'
    yield f'<text x="{LEFT}" y="{HEIGHT - 8}">{_text(history.commits[0].short)}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{_text(history.commits[-1].short)}</text>'
    yield "</svg>"


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of the vertical axis, at least 2 % of the value, so that small noise looks small."""
    middle, span = (max(values) + min(values)) / 2, max(values) - min(values)
    half = max(0.55 * span, 0.01 * middle, 1e-9)
    return middle - half, middle + half


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in the range."""
    step = 10 ** math.floor(math.log10(high - low))
    step = next(step * factor for factor in (0.2, 0.5, 1, 2) if (high - low) / (step * factor) <= 6)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
