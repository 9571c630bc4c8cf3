"""The command `sglang perf`: compares perf dumps of two programs, prints Markdown and returns an exit code."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sglang_gen import destination, log
from sglang_gen import files as output
from sglang_gen.config.schema import plain
from sglang_gen.errors import UserError, nearest
from sglang_gen.perf.compare import KINDS, TOLERANCES, Comparison, Report, Row, Tolerance, compare
from sglang_gen.perf.dump_reader import collect
from sglang_gen.perf.statistics import MOST_REPEATS, Verdict

REPORT_VERSION = 1
EXIT_CODES = {
    Verdict.PASS: 0,
    Verdict.IMPROVEMENT: 0,
    Verdict.REGRESSION: 1,
    Verdict.TOO_NOISY: 3,
    Verdict.RECIPE_MISMATCH: 3,
}
_MEANINGS = {
    "total": "whole generation",
    "stage": "each stage",
    "step": "the median denoising step",
    "memory": "each peak of memory",
}


def _share(value: float) -> str:
    return f"{100 * value:.4g}%"


def _spelling(kind: str, tolerance: Tolerance) -> str:
    parts = [_share(tolerance.relative)] if tolerance.relative or not tolerance.absolute else []
    parts += [f"{tolerance.absolute:g}{KINDS[kind][0].lower()}"] if tolerance.absolute else []
    return ",".join(parts)


HELP = """\
usage: sglang perf COMMAND ...

commands:
  compare    compare perf dumps and report regressions (sglang perf compare --help)"""

COMPARE_HELP = """\
usage: sglang perf compare BASE NEW [NEW ...] [options]

Compare the performance of two programs. BASE and NEW are perf dumps (sglang generate --perf-dump-path FILE) or folders
of perf dumps. All NEW are compared with BASE together. Dumps with the same fingerprint (model, settings, machine) are
repeats of one recipe; more repeats give narrower confidence intervals.

options:
  --tolerance METRIC=VALUE  change of a metric that is allowed: a percentage, an amount, or the larger of both, such as
                            total=3%, memory=64mb or stage=10%,120ms; can be repeated. Defaults:
{tolerances}
  --confidence PERCENT      confidence of the intervals (default: 95%)
  --json FILE               write the report as JSON
  --markdown FILE           write the report as Markdown
  -h, --help                show this help

exit codes: 0 PASS or IMPROVEMENT, 1 REGRESSION, 2 wrong usage, 3 TOO_NOISY or RECIPE_MISMATCH""".format(
    tolerances="\n".join(
        f"{'':28}{f'{kind}={_spelling(kind, tolerance)}':18}{_MEANINGS[kind]}" for kind, tolerance in TOLERANCES.items()
    )
)


def main(argv: Sequence[str]) -> int:
    """Run `sglang perf ARGV...`; returns the exit code. Raises UserError, or RunError if a report cannot be written."""
    if not argv or argv[0] in ("-h", "--help"):
        output.print_result(HELP)
        return 0 if argv else 2
    if argv[0] != "compare":
        raise UserError(f"Unknown command 'perf {argv[0]}'{nearest(argv[0], ['compare'])} (commands: compare)")
    given = _parse(argv[1:])
    if given.help:
        output.print_result(COMPARE_HELP)
        return 0
    if len(given.paths) < 2:
        raise UserError("sglang perf compare needs a BASE and at least one NEW, each a perf dump or a folder of dumps")
    for path in given.paths:
        _check_name("BASE and NEW", path)
    paths = [os.path.expanduser(path) for path in given.paths]
    reports = {
        option: os.path.expanduser(path)
        for option, path in (("--json", given.json), ("--markdown", given.markdown))
        if path is not None
    }
    for option, path in reports.items():
        _check_name(option, path)
        if path.endswith("/"):
            raise UserError(f"sglang perf compare: {option} must name a file, and {path} ends in a slash")
        output.prepare_file(
            Path(path), stream=True
        )  # before the comparison, since a failed write has the same exit code as a verdict
    tolerances, confidence = _tolerances(given.tolerance), _confidence(given.confidence)
    base, new = collect(paths[:1]), collect(paths[1:])
    _check_reports(reports, [dump.path for dump in (*base, *new)])
    report = compare(base, new, tolerances, confidence)
    text = markdown(report)
    if "--json" in reports:
        output.save_json(Path(reports["--json"]), as_json(report), stream=True)
    if "--markdown" in reports:
        output.save_bytes(Path(reports["--markdown"]), f"{text}\n".encode(), stream=True)
    output.print_result(text)
    return EXIT_CODES[report.verdict]


def _check_name(what: str, path: str) -> None:
    if not path.strip() or "\0" in path:
        raise UserError(f"sglang perf compare: {what} must name a file, not {path!r}")


def _check_reports(reports: Mapping[str, str], inputs: Iterable[Path]) -> None:
    """Raises UserError if a report would overwrite a dump that is compared, or the other report."""
    taken = {path.resolve(): f"{path}, which is compared" for path in inputs}
    for option, path in reports.items():
        place = Path(path).resolve()
        if destination.find(Path(path)).is_stream:
            continue
        if place in taken:
            raise UserError(f"sglang perf compare: {option} {path} would replace {taken[place]}; give another name")
        taken[place] = f"the report of {option}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"sglang perf compare: {message}")


class _Once(argparse.Action):
    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise UserError(f"{option} is given twice")
        setattr(namespace, self.dest, values)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--tolerance", action="append", default=[])
    for option in ("--confidence", "--json", "--markdown"):
        parser.add_argument(option, action=_Once)
    parser.add_argument("-h", "--help", action="store_true")
    given, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        options = ("--tolerance", "--confidence", "--json", "--markdown", "--help")
        raise UserError(f"Unknown option {name}{nearest(name, options)} (sglang perf compare --help lists all)")
    return given


def _tolerances(given: Sequence[str]) -> dict[str, Tolerance]:
    """The defaults, updated with the given tolerances; a given tolerance replaces both parts of its default."""
    tolerances: dict[str, Tolerance] = {}
    for word in given:
        kind, _, text = word.partition("=")
        if kind not in KINDS:
            raise UserError(
                f"--tolerance: there is no metric '{kind}'{nearest(kind, KINDS)} (metrics: {', '.join(KINDS)})"
            )
        if kind in tolerances:
            raise UserError(f"--tolerance: {kind} is given twice")
        parts: dict[str, float] = {}
        for part in text.lower().split(","):
            name, unit = ("relative", "%") if part.strip().endswith("%") else ("absolute", KINDS[kind][0].lower())
            if name in parts:
                raise UserError(
                    f"--tolerance: '{word}' gives two values of one kind; give one percentage and one amount"
                )
            parts[name] = _amount(part.strip(), unit, word)
        tolerances[kind] = Tolerance(parts.get("relative", 0.0) / 100, parts.get("absolute", 0.0))
    return {**TOLERANCES, **tolerances}


def _amount(text: str, unit: str, word: str) -> float:
    try:
        value = float(text.removesuffix(unit)) if text.endswith(unit) else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e12:
        raise UserError(f"--tolerance: '{word}' is not of the form total=2%, stage=10%,120ms or memory=64mb")
    return value


def _confidence(text: str | None) -> float:
    try:
        value = 95.0 if text is None else float(text.removesuffix("%"))
    except ValueError:
        value = 0.0
    if not 50 <= value <= 99.99:
        raise UserError(f"--confidence: '{text}' is not a percentage between 50% and 99.99%")
    return value / 100


def as_json(report: Report) -> dict[str, Any]:
    """The report with all its numbers, as JSON-serializable data."""
    content: dict[str, Any] = plain(report)
    return {"report_version": REPORT_VERSION, **content, "exit_code": EXIT_CODES[report.verdict]}


def markdown(report: Report) -> str:
    """The report as Markdown: the verdict, then one table per recipe."""
    lines = [f"**{report.verdict.name}**"]
    for item in report.comparisons:
        lines += ["", f"## {item.verdict.name}: {_cell(item.model)}, {_cell(item.prompt)}", ""]
        lines += _mismatch(item) if item.verdict is Verdict.RECIPE_MISMATCH else _judged(item, report.confidence)
        lines += [f"- {note}" for note in item.notes]
    if report.base_without_new:
        names = ", ".join(map(str, report.base_without_new))
        lines += ["", f"Recipes of the base without counterpart, not judged: {names}"]
    return log.visible("\n".join(lines))


def _mismatch(comparison: Comparison) -> list[str]:
    files = f"{', '.join(map(str, comparison.new_files))} against the nearest recipe, {comparison.base_files[0]}:"
    rows = [
        f"| {_cell(item['field'])} | {_cell(item['base'])} | {_cell(item['new'])} |" for item in comparison.differences
    ]
    return [files, "", "| field | base | new |", "|---|---|---|", *rows, ""]


def _judged(comparison: Comparison, confidence: float) -> list[str]:
    lines = [
        f"| metric | base | new | new/base | {_share(confidence)} interval | tolerance | verdict |",
        "|---|---|---|---|---|---|---|",
        *map(_line, comparison.rows),
        "",
    ]
    if None not in (rates := comparison.images_per_second).values():
        lines.append(f"- images per second: {rates['base']:.4g}, now {rates['new']:.4g}")
    for side, names in comparison.only_in.items():
        if names:
            lines.append(f"- only in {side}, not judged: {_cell(', '.join(names), 10_000)}")
    return lines


def _line(row: Row) -> str:
    def side(values: Any) -> str:
        count = len(values.observations)
        spread = "" if values.noise is None else f" ± {_share(values.noise)}"
        return f"{values.geometric_mean:.6g} {row.unit}{spread}" + (f" (n={count})" if count > 1 else "")

    interval = "none" if row.interval is None else "{:.4f} to {:.4f}".format(*row.interval)
    verdict = row.verdict.name
    if row.repeats_needed is not None:
        verdict += f", {'more than ' if row.repeats_needed >= MOST_REPEATS else ''}{row.repeats_needed} repeats needed"
    cells = (
        _cell(row.metric),
        side(row.base),
        side(row.new),
        f"{row.ratio:.4f}",
        interval,
        _share(row.tolerance),
        verdict,
    )
    return f"| {' | '.join(cells)} |"


def _cell(value: Any, length: int = 100) -> str:
    """A value as one cell of a Markdown table, truncated to `length` characters."""
    text = log.visible(" ".join(str(value).split())).replace("|", "\\|")
    return text if len(text) <= length else f"{text[: length - 3]}..."
