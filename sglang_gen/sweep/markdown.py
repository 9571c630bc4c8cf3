"""The table of a sweep for readers, in Markdown whose lines fit a width. All other numbers are in table.csv."""

import itertools
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence

from sglang_gen import log
from sglang_gen.perf.attributes import ACCURACY, REFERENCE_ACCURACY
from sglang_gen.perf.dump_facts import FACTS
from sglang_gen.perf.dump_numbers import MEAN_STEP, Measure
from sglang_gen.report.job_reader import Row
from sglang_gen.sweep.columns import Column, escaped, fit, render, wrapped
from sglang_gen.sweep.measured import base_row, is_mean_needed, speed_ups
from sglang_gen.sweep.swept import changes, layout, swept_cells

FILE_WIDTH = 120  # columns of table.md
MOST_VARIANTS = 4  # different values of a fact that are listed
MOST_RANGES = 12  # jobs, or runs of jobs, that are listed
_MARKS = {
    "kept": ("k", "kept from an earlier run of this sweep"),
    "reused": ("r", "took the weights of an earlier job"),
}
_NAMES = {"device": "device memory", "host": "host memory"}  # what a header is called outside of the table
UNSHOWN = ("each stage", "loading", "images per second", "all settings")  # only in table.csv, whatever the width


def to_markdown(rows: Sequence[Row], title: str = "Sweep", limit: int = FILE_WIDTH) -> str:
    """The table with lines of at most `limit` columns.

    What all jobs share is stated once above it; the reasons of jobs that did not complete are below it.
    """
    shared = _shared(rows)
    swept = swept_cells(rows, shared)
    columns, left_out = fit([*_job(rows), *swept.columns, *_measured(rows)], limit)
    above = [f"# {prose(title)}", "", *wrapped(_count(rows), limit), ""]
    above += _bullets([*_facts(rows, swept.shown), *_all_jobs(shared), *_changes(rows, swept.shown)], limit)
    below = _bullets([*_reasons(rows), *_marks(rows)], limit)
    if any(row.times for row in rows):
        missing = [_NAMES.get(name, name) for header in left_out for name in [header.partition(" (")[0]]]
        below += [*wrapped(" ".join(_legend(rows, columns)), limit), ""]
        below += [*wrapped(f"Only in table.csv: {', '.join([*missing, *UNSHOWN])}.", limit), ""]
    return "\n".join([*above, *render(columns), "", *below]).rstrip("\n") + "\n"


def _bullets(lines: Iterable[str], limit: int) -> list[str]:
    """A Markdown list, and an empty line after it."""
    found = [part for line in lines for part in wrapped(f"- {line}", limit, "  ")]
    return [*found, ""] if found else []


def _count(rows: Sequence[Row]) -> str:
    done, planned = (sum(row.status == status for row in rows) for status in ("completed", "planned"))
    return f"{done} of {len(rows)} jobs completed{f', {planned} planned without running' if planned else ''}."


def _shared(rows: Sequence[Row]) -> list[str]:
    """Overrides that all jobs have."""
    own = [set(row.overrides) for row in rows]
    return [word for word in rows[0].overrides if all(word in words for words in own)] if rows else []


def _all_jobs(shared: Sequence[str]) -> list[str]:
    return [f"All jobs: {code(shlex.join(shared))}"] if shared else []


def _facts(rows: Sequence[Row], shown: Sequence[str]) -> Iterator[str]:
    """What ran, once for all jobs or with the jobs that each value applies to."""
    for name in FACTS:
        yield from _stated(name.capitalize(), [(row, _fact(row, name)) for row in rows if name in row.facts])
    layouts = [(row, degrees) for row in rows if (degrees := layout(row))]
    if "parallel" not in shown and any(degrees != "single" for _, degrees in layouts):
        yield from _stated("Layout", layouts)


def _fact(row: Row, name: str) -> str:
    return f"auto → {row.facts[name]}" if row.requested.get(name) == "auto" else row.facts[name]


def _stated(name: str, values: Sequence[tuple[Row, str]]) -> Iterator[str]:
    jobs = _by_value(values)
    if len(jobs) > MOST_VARIANTS:
        yield f"{name}: {len(jobs)} different ones"
    elif jobs:
        words = [prose(value) + (f" (jobs {ranges(of)})" if len(jobs) > 1 else "") for value, of in jobs.items()]
        yield f"{name}: {'; '.join(words)}"


def _changes(rows: Sequence[Row], shown: Iterable[str]) -> Iterator[str]:
    """Settings whose effective value differs from the requested one, unless the table shows them."""
    found = [
        prose(f"{name} {change}") + (f" (jobs {ranges(of)})" if len(jobs) > 1 or len(of) < had else "")
        for name, changed, had in changes(rows, {*shown, "backend"})
        for jobs in [_by_value(changed)]
        for change, of in jobs.items()
    ]
    if found:
        yield f"In effect: {', '.join(found)}"


def _by_value(pairs: Iterable[tuple[Row, str]]) -> dict[str, list[str]]:
    """The names of the jobs of each value."""
    jobs: dict[str, list[str]] = {}
    for row, value in pairs:
        jobs.setdefault(value, []).append(row.job)
    return jobs


def ranges(jobs: Sequence[str]) -> str:
    """Names of jobs with runs of numbers joined: `0-3, 7`."""
    numbers = sorted(int(job) for job in jobs if job.isdigit())
    words = list[str]()
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        words += map(str, run) if len(run) < 3 else [f"{run[0]}-{run[-1]}"]
    words += [prose(job) for job in jobs if not job.isdigit()]
    return ", ".join(words) if len(words) <= MOST_RANGES else f"{', '.join(words[:MOST_RANGES])} and others"


def _job(rows: Sequence[Row]) -> list[Column]:
    """The name of each job, and behind it the letters of its marks."""
    marks = ["".join(_MARKS[mark][0] for mark in row.marks) for row in rows]
    size, letters = (max(map(len, words), default=0) for words in ([row.job for row in rows], marks))
    names = [
        f"{row.job:>{size}} {mark:{letters}}" if letters else row.job for row, mark in zip(rows, marks, strict=True)
    ]
    return [Column("job", names)]


def _marks(rows: Sequence[Row]) -> Iterator[str]:
    for name, (letter, meaning) in _MARKS.items():
        if any(name in row.marks for row in rows):
            yield f"{letter}: {meaning}"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """The reasons of jobs that did not complete, each once with its jobs."""
    for reason, jobs in _by_value((row, row.error) for row in rows if row.error).items():
        yield f"{ranges(jobs)}: {prose(reason)}"


def _measured(rows: Sequence[Row]) -> list[Column]:
    """Step times, speed-up, total, memory and quality; columns without any value are left out."""
    steps = [row.times.get("step") for row in rows]
    shows_mean = is_mean_needed(rows)
    means = [row.times.get(MEAN_STEP) if shows_mean else None for row in rows]
    totals = [row.times.get("total") for row in rows]
    ratios = speed_ups(rows, MEAN_STEP if shows_mean else "step")
    if sum(item is not None for item in ratios) < 2:
        ratios = [None] * len(rows)  # nothing to compare with
    found = [
        _times("step", steps, 0, 72 if any(means) else 39),
        _times("mean step", means, 30, 38),
        Column("speed-up", [_ratio(item) for item in ratios], 10, False, [_ratio(item, True) for item in ratios], 70),
        _times("total", totals, 60),
        *_memory(rows),
        Column("verdict", [_verdict(row) for row in rows], 46, False, [_brief_verdict(row) for row in rows], 85),
        Column("PSNR (dB)", [_psnr(row) for row in rows], 45),
        Column("SSIM", [digits(row.quality.get("ssim")) for row in rows], 80),
        Column("max error", [digits(row.quality.get("max_error")) for row in rows], 90),
        _attributes(rows),
    ]
    return _with_status(rows, [column for column in found if any(column.cells)])


def _with_status(rows: Sequence[Row], columns: list[Column]) -> list[Column]:
    """Jobs that did not complete have their status in place of a step time."""
    words = ["" if row.status == "completed" else row.status for row in rows]
    if not any(words):
        return columns
    if not columns or not columns[0].header.startswith("step"):
        return [Column("status", [row.status for row in rows]), *columns]
    first = columns[0]
    cells, brief = ([word or cell for word, cell in zip(words, of, strict=True)] for of in (first.cells, first.brief))
    return [Column(first.header, cells, first.rank, False, brief, first.brief_rank), *columns[1:]]


def _times(name: str, items: Sequence[Measure | None], rank: int, brief_rank: int = 0) -> Column:
    """A column in ms if all times are below a second, else in s; with a `brief_rank` it has intervals."""
    unit, scale = ("ms", 1000) if all(item.median < 1 for item in items if item) else ("s", 1)
    brief = [digits(item.median * scale) if item else "" for item in items]
    if not brief_rank:
        return Column(f"{name} ({unit})", brief, rank)
    cells = [_interval(item, scale) for item in items]
    return Column(f"{name} ({unit})", cells, rank, False, brief, brief_rank if cells != brief else rank)


def _interval(item: Measure | None, scale: float) -> str:
    """`12.50 ± 0.31`: the half width has no more decimals than the median."""
    if item is None:
        return ""
    text = digits(item.median * scale)
    if item.high is None:
        return text
    half = (item.high - item.median) * scale
    decimals = min(len(words.partition(".")[2]) for words in (text, digits(half)))
    return f"{text} ± {half:.{decimals}f}"


def _ratio(item: Measure | None, brief: bool = False) -> str:
    if item is None:
        return ""
    interval = "" if item.low is None or item.high is None or brief else f" ({item.low:.2f} to {item.high:.2f})"
    return f"{item.median:.2f}x{interval}"


def _memory(rows: Sequence[Row]) -> list[Column]:
    """Device and host peaks. Only one of them is called memory, and the host's comes second beside a device's."""
    names = {"peak_device_mb": "device", "peak_host_mb": "host"}
    found = [name for name in names if any(row.memory.get(name) for row in rows)]
    columns = []
    for name in found:
        values = [row.memory.get(name) for row in rows]
        unit, scale = ("GiB", 1024) if max(value or 0 for value in values) >= 10_000 else ("MiB", 1)
        header = names[name] if len(found) > 1 else "memory"
        rank = 75 if name != found[0] else 50
        columns.append(Column(f"{header} ({unit})", [digits(value and value / scale) for value in values], rank))
    return columns


def _verdict(row: Row) -> str:
    """The verdict on the images of a job; empty for a dump of an older version."""
    return str(row.quality.get("verdict") or "")


def _brief_verdict(row: Row) -> str:
    return _verdict(row).removeprefix("equal within ")


def _psnr(row: Row) -> str:
    """Identical images have an infinite PSNR, which JSON cannot represent."""
    return "identical" if row.quality.get("identical") else digits(row.quality.get("psnr"))


def _attributes(rows: Sequence[Row]) -> Column:
    """The attribute accuracy, and behind a slash that of the reference."""

    def percent(row: Row, name: str, before: str = "") -> str:
        value = row.quality.get(name)
        return "" if value is None else f"{before}{digits(100 * value)}"

    both = [percent(row, ACCURACY) + percent(row, REFERENCE_ACCURACY, " / ") for row in rows]
    return Column("attributes (%)", both, 47)


def digits(value: float | None) -> str:
    """The number with four significant digits, without exponent unless it is tiny."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    if not math.isfinite(value) or 0 < abs(value) < 1e-6:
        return f"{value:.4g}"
    rounded = float(f"{value:.4g}")
    place = math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{value:.{max(3 - place, 0)}f}"


def _legend(rows: Sequence[Row], columns: Sequence[Column]) -> Iterator[str]:
    """What the columns are, as far as they are shown."""
    shown = {column.header.partition(" (")[0] for column in columns}
    if "step" in shown:
        yield "Step: the median denoising step."
    if any("±" in cell for column in columns for cell in column.cells):
        repeats = sorted(
            {item.repeats for row in rows for item in [row.times.get("step")] if item and item.repeats > 1}
        )
        counts = " to ".join(map(str, dict.fromkeys((repeats[0], repeats[-1]))))
        yield f"Times are medians of {counts} repeats, with the 95 % interval."
    base = base_row(rows)
    if base is not None and "speed-up" in shown:
        mean, why = ("mean ", ", since the steps do not all take the same time") if is_mean_needed(rows) else ("", "")
        yield f"Speed-up: {mean}step time of job {base.job} / that of the job{why}."
    if "attributes" in shown:
        cells = [cell for column in columns if column.header == "attributes (%)" for cell in column.cells]
        other = " / that of the reference's images" if any(" / " in cell for cell in cells) else ""
        yield f"Attributes: accuracy of the images{other}."
    if shown & {"memory", "device", "host"}:
        on_host = "" if any(row.memory.get("peak_device_mb") for row in rows) else ", on the host"
        yield f"Memory: the highest peak of any rank{on_host}."


def prose(text: str) -> str:
    """Plain text for Markdown outside of tables, where a vertical bar means nothing."""
    return escaped(text).replace("\\|", "|")


def code(text: str) -> str:
    """Markdown code on one line."""
    text = log.visible(" ".join(text.split()))
    return f"`` {text} ``" if "`" in text else f"`{text}`"
