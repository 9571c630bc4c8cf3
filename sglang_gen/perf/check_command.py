"""`sglang perf check`: compares perf dumps with the baseline of their machine and fingerprint, and adds them to it."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_gen import files as output
from sglang_gen import log
from sglang_gen.errors import UserError
from sglang_gen.perf import baseline
from sglang_gen.perf.arguments import CHECK_METRIC_HELP, Parser, confidence, metrics, tolerance_help, tolerances
from sglang_gen.perf.baseline import Baseline
from sglang_gen.perf.busy_machine import CPU, QUIET
from sglang_gen.perf.compare import JUDGED, Comparison, Report, Rules, compare, worst
from sglang_gen.perf.compare_command import EXIT_CODES, as_json, write
from sglang_gen.perf.compare_markdown import changed_fields, markdown
from sglang_gen.perf.dump_reader import Dump, collect
from sglang_gen.perf.log_ratio import Method
from sglang_gen.perf.recipe import differences
from sglang_gen.perf.statistics import Verdict

CHECK_CONFIDENCE = "99%"
CHECKED = (CPU, *JUDGED)  # unless others are named
LOCK_FILE, LONGEST_WAIT = ".lock", 60.0  # of a baseline's folder, and the seconds in which another run adds to it
CHECK_HELP = f"""\
usage: sglang perf check DUMP [DUMP ...] [options]

Compare perf dumps, or folders of them, with a baseline: the observations of earlier dumps of the same fingerprint on
the same machine, which a folder holds as small JSON files. Verdicts are those of sglang perf compare.

options:
  --baseline FOLDER         the folder of the baselines (default: {baseline.DEFAULT_FOLDER}); each folder in it is
                            a machine, and may be renamed or copied
  --save                    add the dumps to the baseline, except for those of a recipe with a REGRESSION; the first
                            dumps of a recipe make a new baseline
  --replace                 in place of --save: without exception, and without the earlier observations, which accepts
                            the new times
  --keep NUMBER             dumps that a baseline keeps, the newest (default: {baseline.KEPT})
  --machine NAME            name of the machine (default: its processor or GPUs). Equal machines may differ in speed, so
                            name each machine, or each kind of CI runner
{CHECK_METRIC_HELP}
{tolerance_help(CHECK_CONFIDENCE)}
  --json FILE               write the report as JSON
  --markdown FILE           write the report as Markdown
  -h, --help                show this help

exit codes: 0 PASS, IMPROVEMENT or a new baseline, 1 REGRESSION, 2 wrong usage, 3 TOO_NOISY or no baseline"""


@dataclass(frozen=True)
class Group:
    """The new dumps of one recipe on one machine, its baseline, and their comparison, if there is one.

    `nearest` is the most similar recipe of this machine.
    """

    machine: str
    dumps: list[Dump]
    baseline: Baseline | None
    comparison: Comparison | None
    nearest: Baseline | None

    def accepted(self, given: argparse.Namespace) -> bool:
        """Whether these options add the dumps to the baseline."""
        slower = self.comparison is not None and self.comparison.verdict is Verdict.REGRESSION
        return given.replace or (given.save and not slower)


def main(argv: Sequence[str]) -> int:
    """Run `sglang perf check ARGV...`; returns the exit code."""
    options = ("--baseline", "--machine", "--keep", "--metric", "--confidence", "--json", "--markdown")
    parser = Parser("check", "each DUMP", options, ("--save", "--replace")).take_tolerances()
    given = parser.read(argv)
    if given.help:
        output.print_result(CHECK_HELP)
        return 0
    if not given.paths:
        raise UserError("sglang perf check needs at least one perf dump or folder of dumps")
    if given.keep is not None and not (given.save or given.replace):
        raise UserError("--keep has no effect without --save or --replace")
    if given.save and given.replace:
        raise UserError("--save and --replace are two ways to change a baseline; leave out one of them")
    keep, machine = _number(given.keep), None if given.machine is None else baseline.check_machine(given.machine)
    name = baseline.DEFAULT_FOLDER if given.baseline is None else given.baseline
    parser.check_name("--baseline", name)
    folder = Path(os.path.expanduser(name))
    limits = tolerances(given.tolerance)
    level = confidence(CHECK_CONFIDENCE if given.confidence is None else given.confidence)
    rules = Rules(limits, level, method=Method.DRIFTING, quiet=QUIET if given.metric is None else None)
    reports = parser.reports(json=given.json, markdown=given.markdown)
    dumps = collect(map(os.path.expanduser, given.paths))
    rules = replace(rules, metrics=metrics(given.metric, given.tolerance, dumps, CHECKED))
    with _held(folder) if given.save or given.replace else nullcontext():
        known = baseline.read_folder(folder)
        parser.check_reports(reports, [*(dump.path for dump in dumps), *(item.path for item in known)])
        groups = _groups(dumps, known, machine, rules)
        written = [_added(group, folder, keep, given.replace) for group in groups if group.accepted(given)]
        report = _report(groups, rules, given)
        for item in written:
            output.prepare_file(item.path)
        for item in written:
            baseline.save(item)
    remarks = [
        *_remarks(groups, given, folder),
        *(f"- saved: {item.path}, {log.quantity(len(item.dumps), 'dump')}" for item in written),
    ]
    content = {**as_json(report), "baseline": str(folder), "saved": [str(item.path) for item in written]}
    write(reports, content, "\n".join([markdown(report), *(["", *remarks] if remarks else [])]))
    return EXIT_CODES[report.verdict]


def _held(folder: Path) -> AbstractContextManager[None]:
    """Context in which no other check adds to the baselines in `folder`, which is created. Raises UserError."""
    output.check_folder(folder)
    return output.alone(folder, folder / LOCK_FILE, LONGEST_WAIT, UserError)


def _number(text: str | None) -> int:
    if text is None:
        return baseline.KEPT
    if not (text.isdecimal() and 0 < int(text) < 100_000):
        raise UserError(f"--keep: '{text}' is not a number of dumps, such as {baseline.KEPT}")
    return int(text)


def _groups(dumps: Iterable[Dump], known: Iterable[Baseline], machine: str | None, rules: Rules) -> list[Group]:
    known = list(known)
    baselines = {(item.machine, item.recipe): item for item in known}
    new: dict[tuple[str, str], list[Dump]] = {}
    for dump in dumps:
        new.setdefault((machine or baseline.machine_of(dump), dump.recipe), []).append(dump)
    return [
        _judged(key[0], group, baselines.get(key), [item for item in known if item.machine == key[0]], rules)
        for key, group in new.items()
    ]


def _judged(machine: str, dumps: list[Dump], known: Baseline | None, others: Sequence[Baseline], rules: Rules) -> Group:
    """Dumps that the baseline holds already are not compared with themselves."""
    own = {dump.origin.identity for dump in dumps}
    base = [dump for dump in known.dumps if dump.origin.identity not in own] if known else []
    comparison = compare(base, dumps, rules).comparisons[0] if base else None
    nearest = min(others, key=lambda item: len(differences(item.dumps[0], dumps[0])), default=None)
    return Group(machine, dumps, known, comparison, nearest)


def _added(group: Group, folder: Path, keep: int, replace: bool) -> Baseline:
    return baseline.add(group.baseline, group.dumps, folder / group.machine, keep, replace)


def _report(groups: Sequence[Group], rules: Rules, given: argparse.Namespace) -> Report:
    """A recipe without a baseline is a RECIPE_MISMATCH, unless its dumps become one."""
    found = [group.comparison for group in groups if group.comparison]
    absent = [Verdict.RECIPE_MISMATCH for group in groups if not group.comparison and not group.accepted(given)]
    verdict = worst([Verdict.PASS, *(item.verdict for item in found), *absent])
    return Report(verdict, rules.confidence, dict(rules.tolerances), found, [])


def _remarks(groups: Iterable[Group], given: argparse.Namespace, folder: Path) -> Iterator[str]:
    for group in groups:
        dump = group.dumps[0]
        if group.comparison is None and not group.accepted(given):
            other = "other " if group.baseline else ""
            yield (
                f"- no baseline: {folder / group.machine} has no {other}dump of the recipe of {dump.path}; "
                "sglang perf check --save makes one of it"
            )
            if group.nearest is not None and group.baseline is None:
                changes = "; ".join(changed_fields(differences(group.nearest.dumps[0], dump)))
                yield f"- the nearest baseline, {group.nearest.path}, differs: {changes}"
        elif group.comparison is not None and given.save and not group.accepted(given):
            yield f"- not saved, since it is a REGRESSION: {dump.path}; --replace accepts the new times"
        elif group.comparison is not None and group.comparison.verdict is Verdict.IMPROVEMENT and not given.replace:
            yield f"- the baseline has slower observations than {dump.path}; --replace starts a new one"
