"""`sglang perf history`: the metrics of perf dumps over commits, and the commits that changed them."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sglang_gen import files as output
from sglang_gen.config.schema import plain
from sglang_gen.errors import UserError
from sglang_gen.perf import history, history_page
from sglang_gen.perf.arguments import METRIC_HELP, Parser, confidence, metrics, tolerance_help, tolerances
from sglang_gen.perf.change_points import FEW_COMMITS
from sglang_gen.perf.compare import Rules
from sglang_gen.perf.history_markdown import markdown

HISTORY_VERSION = 1
HISTORY_CONFIDENCE = "99%"
HISTORY_HELP = f"""\
usage: sglang perf history PATH [PATH ...] [options]

Show the metrics of perf dumps over commits, in the order of time, and the commits at which they changed. Each PATH is a
perf dump, a baseline of sglang perf check, or a folder of them. Dumps of one commit are repeats. Each fingerprint and
machine has a history of its own. Dumps of SGLang are read too.
Fewer than {FEW_COMMITS} commits do not show their noise, and changes among them may not be found.

options:
{METRIC_HELP}
{tolerance_help(HISTORY_CONFIDENCE)}
  --html FILE               write plots of all metrics as one HTML page
  --json FILE               write values and changes as JSON
  --markdown FILE           write the report as Markdown
  -h, --help                show this help

exit codes: 0 the report was made, 2 wrong usage"""


def main(argv: Sequence[str]) -> int:
    """Run `sglang perf history ARGV...`; returns the exit code."""
    options = ("--metric", "--confidence", "--html", "--json", "--markdown")
    parser = Parser("history", "each PATH", options).take_tolerances()
    given = parser.read(argv)
    if given.help:
        output.print_result(HISTORY_HELP)
        return 0
    if not given.paths:
        raise UserError("sglang perf history needs at least one perf dump, baseline or folder of them")
    if importlib.util.find_spec("ruptures") is None:
        raise UserError("sglang perf history needs the package ruptures: pip install 'sglang-gen[history]'")
    limits = tolerances(given.tolerance)
    level = confidence(HISTORY_CONFIDENCE if given.confidence is None else given.confidence)
    reports = parser.reports(html=given.html, json=given.json, markdown=given.markdown)
    dumps = history.read(given.paths)
    parser.check_reports(reports, [dump.path for _, dump in dumps])
    judged = metrics(given.metric, given.tolerance, [dump for _, dump in dumps])
    found = history.histories(dumps, Rules(limits, level, metrics=judged))
    text = markdown(found, level)
    content = {"history_version": HISTORY_VERSION, "confidence": level, "histories": plain(found)}
    if "--html" in reports:
        output.save_bytes(Path(reports["--html"]), history_page.page(found, level).encode(), stream=True)
    if "--json" in reports:
        output.save_json(Path(reports["--json"]), content, stream=True)
    if "--markdown" in reports:
        output.save_bytes(Path(reports["--markdown"]), f"{text}\n".encode(), stream=True)
    output.print_result(text)
    return 0
