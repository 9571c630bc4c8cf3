"""The report of `sglang perf history` as Markdown, with the values of a metric as a line of block characters."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

from sglang_gen import log
from sglang_gen.perf.change_points import FEW_COMMITS, Change
from sglang_gen.perf.compare_markdown import cell, share
from sglang_gen.perf.history import History, Series

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_BLOCKS = 60  # longer series are averaged
TOO_FEW = (
    f"Fewer than {FEW_COMMITS} commits do not show their noise, so changes may not be found; sglang perf check and "
    "sglang perf compare judge two programs by their dumps."
)
LEAST_SPAN = 0.02  # log ratio that the blocks span at least, so that small noise looks small


def markdown(histories: Sequence[History], confidence: float) -> str:
    """One table of metrics and one of change points for each recipe."""
    return log.visible("\n".join(line for item in histories for line in _lines(item, confidence)).strip())


def _lines(history: History, confidence: float) -> Iterator[str]:
    commits, dumps = history.commits, sum(commit.dumps for commit in history.commits)
    yield from ("", f"## {cell(history.model)}, {cell(history.prompt)}, on {history.machine}", "")
    counts = f"{log.quantity(dumps, 'dump')} of {log.quantity(len(commits), 'commit')}"
    yield f"{counts}, {commits[0].date[:10]} to {commits[-1].date[:10]}."
    yield from ("", "| metric | first | last | history | changes |", "|---|---|---|---|---|")
    for series in history.series:
        values = f"{_value(series, 0)} | {_value(series, -1)} | {sparkline(series.values)}"
        yield f"| {cell(series.metric)} | {values} | {len(series.changes) or 'none'} |"
    if history.is_adjusted:
        yield from ("", "cpu is adjusted for the speed of the machine, which the calibration of each dump shows.")
    if 1 < len(commits) < FEW_COMMITS:
        yield from ("", TOO_FEW)
    changes = [(series, change) for series in history.series for change in series.changes]
    if changes:
        yield from ("", f"| metric | commit | date | change | {share(confidence)} interval | confidence |")
        yield "|---|---|---|---|---|---|"
    for series, change in changes:
        commit = commits[series.commits[change.index]]
        cells = (series.metric, commit.short, commit.date[:10], percent(change.ratio), interval(change))
        yield f"| {' | '.join(map(cell, cells))} | {certainty(change)} |"


def _value(series: Series, index: int) -> str:
    return f"{series.values[index]:.6g} {series.unit}" if series.values else ""


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def interval(change: Change) -> str:
    low, high = change.interval
    return f"{percent(low)} to {percent(high)}"


def certainty(change: Change) -> str:
    """The confidence of a change, rounded down."""
    return f"{math.floor(10_000 * change.confidence) / 100:.2f}%"


def sparkline(values: Sequence[float]) -> str:
    """The logarithms of the values as block characters, at most MOST_BLOCKS of them."""
    count = min(len(values), MOST_BLOCKS)
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count else []
    logs = [fmean(math.log(value) for value in values[start:end]) for start, end in pairwise(edges)]
    if not logs:
        return ""
    middle, span = (max(logs) + min(logs)) / 2, max(max(logs) - min(logs), LEAST_SPAN)
    return "".join(BLOCKS[min(int(((one - middle) / span + 0.5) * len(BLOCKS)), len(BLOCKS) - 1)] for one in logs)
