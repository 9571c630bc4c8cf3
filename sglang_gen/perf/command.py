"""The command `sglang perf`: compares perf dumps of two programs, prints Markdown and returns an exit code."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sglang_gen import destination
from sglang_gen import files as output
from sglang_gen.config.schema import plain
from sglang_gen.errors import UserError, nearest
from sglang_gen.perf.compare import KINDS, TOLERANCES, Report, Rules, Tolerance, compare, compare_within
from sglang_gen.perf.compare_markdown import markdown, share
from sglang_gen.perf.dump_reader import collect
from sglang_gen.perf.recipe import fields_of
from sglang_gen.perf.statistics import Verdict

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


def _spelling(kind: str, tolerance: Tolerance) -> str:
    parts = [share(tolerance.relative)] if tolerance.relative or not tolerance.absolute else []
    parts += [f"{tolerance.absolute:g}{KINDS[kind][0].lower()}"] if tolerance.absolute else []
    return ",".join(parts)


HELP = """\
usage: sglang perf COMMAND ...

commands:
  compare    compare perf dumps and report regressions (sglang perf compare --help)"""

COMPARE_HELP = """\
usage: sglang perf compare BASE NEW [NEW ...] [options]
       sglang perf compare --across KEY[,KEY...] FOLDER [options]

Compare the performance of two programs. BASE and NEW are perf dumps (sglang generate --perf-dump-path FILE) or folders
of perf dumps. All NEW are compared with BASE together. Dumps with the same fingerprint (model, settings, machine) are
repeats of one recipe; more repeats give narrower confidence intervals.

With --across, recipes may differ in these keys, and only in these. With one FOLDER, such as that of a sweep, each
recipe is compared with the first in the folder that differs from it in no other key.

options:
  --across KEY[,KEY...]     compare recipes that differ in these config paths or groups, such as parallel, cache or
                            sampling.num_inference_steps, or in fields that a RECIPE_MISMATCH lists
  --tolerance METRIC=VALUE  change of a metric that is allowed: a percentage, an amount, or the larger of both, such as
                            total=3%, memory=64mb or stage=10%,120ms; can be repeated. Defaults:
{tolerances}
  --confidence PERCENT      confidence of the intervals (default: 95%)
  --single                  compare the ratios alone with the tolerances; noise is not considered, and no metric is
                            TOO_NOISY. Without this option, a metric with one observation on each side is never a
                            REGRESSION or an IMPROVEMENT: it passes within its tolerance and is TOO_NOISY beyond
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
    return _compare(given)


def _compare(given: argparse.Namespace) -> int:
    keys = _keys(given.across)
    if len(given.paths) < (1 if keys else 2):
        raise UserError(
            "sglang perf compare needs a BASE and at least one NEW, each a perf dump or a folder of dumps, or --across "
            "and one folder"
        )
    for path in given.paths:
        _check_name("BASE and NEW", path)
    paths = [os.path.expanduser(path) for path in given.paths]
    reports = _reports(given)
    if given.single and given.confidence is not None:
        raise UserError("--confidence has no effect with --single, which computes no intervals; leave out one of them")
    tolerances, confidence = _tolerances(given.tolerance), _confidence(given.confidence)
    base, new = collect(paths[:1]), collect(paths[1:])
    _check_reports(reports, [dump.path for dump in (*base, *new)])
    rules = Rules(tolerances, confidence, fields_of(keys, [*base, *new]), given.single)
    report = compare(base, new, rules) if new else compare_within(base, rules)
    text = markdown(report)
    if "--json" in reports:
        output.save_json(Path(reports["--json"]), as_json(report), stream=True)
    if "--markdown" in reports:
        output.save_bytes(Path(reports["--markdown"]), f"{text}\n".encode(), stream=True)
    output.print_result(text)
    return EXIT_CODES[report.verdict]


def _reports(given: argparse.Namespace) -> dict[str, str]:
    """The files of the reports by option, checked before the comparison, whose exit codes have other meanings."""
    reports = {
        option: os.path.expanduser(path)
        for option, path in (("--json", given.json), ("--markdown", given.markdown))
        if path is not None
    }
    for option, path in reports.items():
        _check_name(option, path)
        if path.endswith("/"):
            raise UserError(f"sglang perf compare: {option} must name a file, and {path} ends in a slash")
        output.prepare_file(Path(path), stream=True)
    return reports


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
    parser.add_argument("--single", action="store_true")
    for option in ("--across", "--confidence", "--json", "--markdown"):
        parser.add_argument(option, action=_Once)
    parser.add_argument("-h", "--help", action="store_true")
    given, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        options = ("--across", "--tolerance", "--confidence", "--single", "--json", "--markdown", "--help")
        raise UserError(f"Unknown option {name}{nearest(name, options)} (sglang perf compare --help lists all)")
    return given


def _keys(text: str | None) -> list[str]:
    """The keys of `--across`, each once."""
    keys = [] if text is None else [key.strip() for key in text.split(",")]
    if not all(keys) or len(set(keys)) < len(keys):
        raise UserError(f"--across: '{text}' is not a list of different keys, such as parallel,cache")
    return keys


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
