"""The report of `sglang perf compare` as Markdown."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sglang_gen import log
from sglang_gen.perf.compare import Comparison, Report, Row
from sglang_gen.perf.paired_quality import QualityRow
from sglang_gen.perf.recipe import keys_of
from sglang_gen.perf.statistics import MOST_REPEATS, Verdict


def share(value: float) -> str:
    return f"{100 * value:.4g}%"


def markdown(report: Report) -> str:
    """The report as Markdown: the verdict, then one table per recipe."""
    lines = [f"**{report.verdict.name}**"]
    for item in report.comparisons:
        lines += ["", f"## {item.verdict.name}: {cell(item.model)}, {cell(item.prompt)}", ""]
        lines += _mismatch(item) if item.verdict is Verdict.RECIPE_MISMATCH else _judged(item, report)
        lines += [f"- {note}" for note in item.notes]
    if report.base_without_new:
        names = ", ".join(map(str, report.base_without_new))
        lines += ["", f"Recipes of the base without counterpart, not judged: {names}"]
    return log.visible("\n".join(lines))


def _mismatch(comparison: Comparison) -> list[str]:
    files = f"{', '.join(map(str, comparison.new_files))} against the nearest recipe, {comparison.base_files[0]}:"
    rows = [
        f"| {cell(item['field'])} | {cell(item['base'])} | {cell(item['new'])} |" for item in comparison.differences
    ]
    hint = (
        f"- to compare them nevertheless: --across {','.join(keys_of([*comparison.across, *comparison.differences]))}"
    )
    is_known = all(item["field"] != "hash" for item in comparison.differences)
    return [files, "", "| field | base | new |", "|---|---|---|", *rows, "", *([hint] if is_known else [])]


def changed_fields(differences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """`parallel.tp 1 → 2`; a field whose parts only one side has, such as a step cache, as a whole."""
    for top, group in itertools.groupby(differences, lambda item: str(item["field"]).partition(".")[0]):
        items = list(group)
        if all(None not in (item["base"], item["new"]) for item in items):
            yield from (f"{cell(item['field'])} {cell(item['base'])} → {cell(item['new'])}" for item in items)
        else:
            yield f"{cell(top)} {_side(items, 'base', top)} → {_side(items, 'new', top)}"


def _side(items: Sequence[Mapping[str, Any]], side: str, top: str) -> str:
    found = {str(item["field"]).removeprefix(top).lstrip("."): item[side] for item in items if item[side] is not None}
    return cell(", ".join(f"{name} {value}".lstrip() for name, value in found.items()) or "absent", 400)


def _judged(comparison: Comparison, report: Report) -> list[str]:
    """The table of a comparison; with --across above it the files and the fields in which the recipes differ."""
    lines = []
    if report.across:
        base, new = (", ".join(map(str, of)) for of in (comparison.base_files, comparison.new_files))
        fields = "; ".join(changed_fields(comparison.across))
        lines += [f"{new} against {base}.", f"They differ in {fields}." if fields else "They have one recipe.", ""]
    lines += [
        f"| metric | base | new | new/base | {share(report.confidence)} interval | tolerance | verdict |",
        "|---|---|---|---|---|---|---|",
        *map(_line, comparison.rows),
        "",
    ]
    if comparison.quality:
        lines += ["| quality | images | base | new | paired difference |", "|---|---|---|---|---|"]
        lines += [*map(_quality_line, comparison.quality), ""]
    if None not in (rates := comparison.images_per_second).values():
        lines.append(f"- images per second: {rates['base']:.4g}, now {rates['new']:.4g}")
    for side, names in comparison.only_in.items():
        if names:
            lines.append(f"- only in {side}, not judged: {cell(', '.join(names), 10_000)}")
    return lines


def _line(row: Row) -> str:
    def side(values: Any) -> str:
        count = len(values.observations)
        spread = "" if values.noise is None else f" ± {share(values.noise)}"
        return f"{values.geometric_mean:.6g} {row.unit}{spread}" + (f" (n={count})" if count > 1 else "")

    interval = "none" if row.interval is None else "{:.4f} to {:.4f}".format(*row.interval)
    verdict = row.verdict.name
    if row.repeats_needed is not None:
        verdict += f", {'more than ' if row.repeats_needed >= MOST_REPEATS else ''}{row.repeats_needed} repeats needed"
    cells = (
        cell(row.metric),
        side(row.base),
        side(row.new),
        f"{row.ratio:.4f}",
        interval,
        share(row.tolerance),
        verdict,
    )
    return f"| {' | '.join(cells)} |"


def _quality_line(row: QualityRow) -> str:
    error = "" if row.standard_error is None else f" ± {row.standard_error:.2g}"
    return f"| {cell(row.measure)} | {row.images} | {row.base:.6g} | {row.new:.6g} | {row.difference:+.4g}{error} |"


def cell(value: Any, length: int = 100) -> str:
    """A value as one cell of a Markdown table, truncated to `length` characters."""
    text = log.visible(" ".join(str(value).split())).replace("|", "\\|")
    return text if len(text) <= length else f"{text[: length - 3]}..."
