"""`sglang perf compare`: compares perf dumps of two programs, prints Markdown and returns an exit code."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_gen import files as output
from sglang_gen.config.schema import plain
from sglang_gen.errors import UserError
from sglang_gen.perf.arguments import METRIC_HELP, Parser, confidence, metrics, tolerance_help, tolerances
from sglang_gen.perf.compare import Report, Rules, compare, compare_within
from sglang_gen.perf.compare_markdown import markdown
from sglang_gen.perf.dump_reader import collect
from sglang_gen.perf.log_ratio import Method
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
COMPARE_HELP = f"""\
usage: sglang perf compare BASE NEW [NEW ...] [options]
       sglang perf compare --across KEY[,KEY...] FOLDER [options]

Compare the performance of two programs. BASE and NEW are perf dumps (sglang generate --perf-dump-path FILE) or folders
of perf dumps. All NEW are compared with BASE together. Dumps with the same fingerprint (model, settings, machine) are
repeats of one recipe; more repeats give narrower confidence intervals. No run may be on both sides.

With --across, recipes may differ in these keys, and only in these. With one FOLDER, such as that of a sweep, each
recipe is compared with the first in the folder that differs from it in no other key.

options:
  --across KEY[,KEY...]     compare recipes that differ in these config paths or groups, such as parallel, cache or
                            sampling.num_inference_steps, or in fields that a RECIPE_MISMATCH lists
{METRIC_HELP}
{tolerance_help("95%")}
  --single                  compare the ratios alone with the tolerances; noise is not considered, and no metric is
                            TOO_NOISY. Without this option, a metric with one observation on each side is never a
                            REGRESSION or an IMPROVEMENT: it passes within its tolerance and is TOO_NOISY beyond
  --paired                  pair the dumps of BASE and NEW in the order of time; they must have been made in turn, so
                            that the drift of the machine cancels. With --across the sides are two recipes
  --json FILE               write the report as JSON
  --markdown FILE           write the report as Markdown
  -h, --help                show this help

exit codes: 0 PASS or IMPROVEMENT, 1 REGRESSION, 2 wrong usage, 3 TOO_NOISY or RECIPE_MISMATCH"""


def main(argv: Sequence[str]) -> int:
    """Run `sglang perf compare ARGV...`; returns the exit code."""
    options = ("--across", "--metric", "--confidence", "--json", "--markdown")
    parser = Parser("compare", "BASE and NEW", options, ("--single", "--paired")).take_tolerances()
    given = parser.read(argv)
    if given.help:
        output.print_result(COMPARE_HELP)
        return 0
    keys = _keys(given.across)
    if len(given.paths) < (1 if keys else 2):
        raise UserError(
            "sglang perf compare needs a BASE and at least one NEW, each a perf dump or a folder of dumps, or --across "
            "and one folder"
        )
    paths = [os.path.expanduser(path) for path in given.paths]
    reports = parser.reports(json=given.json, markdown=given.markdown)
    if given.single and given.confidence is not None:
        raise UserError("--confidence has no effect with --single, which computes no intervals; leave out one of them")
    if given.paired and given.single:
        raise UserError("--paired computes intervals, and --single none; leave out one of them")
    limits, level = tolerances(given.tolerance), confidence(given.confidence)
    base, new = collect(paths[:1]), collect(paths[1:])
    dumps = [*base, *new]
    parser.check_reports(reports, [dump.path for dump in dumps])
    judged = metrics(given.metric, given.tolerance, dumps)
    method = Method.PAIRED if given.paired else Method.INDEPENDENT
    rules = Rules(limits, level, fields_of(keys, dumps), given.single, judged, method)
    report = compare(base, new, rules) if new else compare_within(base, rules)
    write(reports, as_json(report), markdown(report))
    return EXIT_CODES[report.verdict]


def write(reports: Mapping[str, str], content: Mapping[str, Any], text: str) -> None:
    """Write the files of a report, and print it."""
    if "--json" in reports:
        output.save_json(Path(reports["--json"]), content, stream=True)
    if "--markdown" in reports:
        output.save_bytes(Path(reports["--markdown"]), f"{text}\n".encode(), stream=True)
    output.print_result(text)


def _keys(text: str | None) -> list[str]:
    """The keys of `--across`, each once."""
    keys = [] if text is None else [key.strip() for key in text.split(",")]
    if not all(keys) or len(set(keys)) < len(keys):
        raise UserError(f"--across: '{text}' is not a list of different keys, such as parallel,cache")
    return keys


def as_json(report: Report) -> dict[str, Any]:
    """The report with all its numbers, as JSON-serializable data."""
    content: dict[str, Any] = plain(report)
    return {"report_version": REPORT_VERSION, **content, "exit_code": EXIT_CODES[report.verdict]}
