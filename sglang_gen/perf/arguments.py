"""Options that the commands of `sglang perf` share: parsing, tolerances, and the files of their reports."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sglang_gen import destination
from sglang_gen import files as output
from sglang_gen.errors import UserError, nearest
from sglang_gen.perf.busy_machine import QUIET, WALL_CLOCK
from sglang_gen.perf.compare import JUDGED, KINDS, TOLERANCES, Tolerance
from sglang_gen.perf.compare_markdown import share
from sglang_gen.perf.dump_reader import Dump

_MEANINGS = {
    "total": "whole generation",
    "stage": "each stage",
    "step": "the median denoising step",
    "memory": "each peak of memory",
    "cpu": "processor time, on a CPU",
}


def _spelling(kind: str, tolerance: Tolerance) -> str:
    parts = [share(tolerance.relative)] if tolerance.relative or not tolerance.absolute else []
    parts += [f"{tolerance.absolute:g}{KINDS[kind][0].lower()}"] if tolerance.absolute else []
    return ",".join(parts)


METRIC_HELP = """\
  --metric METRIC[,METRIC...]
                            metrics to judge, such as total, stage.denoising or cpu (default: {judged})""".format(
    judged=", ".join(JUDGED)
)
CHECK_METRIC_HELP = """\
  --metric METRIC[,METRIC...]
                            metrics to judge, such as total, stage.denoising or cpu (default: cpu and memory, and if the
                            noise is below {quiet:g}% or there is no cpu, {judged})""".format(
    quiet=100 * QUIET, judged=", ".join(kind for kind in JUDGED if kind in WALL_CLOCK)
)


def tolerance_help(level: str) -> str:
    """The lines about --tolerance and --confidence, whose default is `level`."""
    defaults = [
        f"{'':28}{f'{kind}={_spelling(kind, tolerance)}':18}{_MEANINGS[kind]}" for kind, tolerance in TOLERANCES.items()
    ]
    return "\n".join(
        [
            "  --tolerance METRIC=VALUE  change of a metric that is allowed: a percentage, an amount, or the larger of "
            "both, such as",
            f"{'':28}total=3%, memory=64mb or stage=10%,120ms; can be repeated. Defaults:",
            *defaults,
            f"  --confidence PERCENT      confidence of the intervals (default: {level})",
        ]
    )


class Parser(argparse.ArgumentParser):
    """Parses the words of one command; an unknown option or a missing value is a UserError."""

    def __init__(self, command: str, paths: str, once: Sequence[str] = (), switches: Sequence[str] = ()) -> None:
        super().__init__(prog=f"sglang perf {command}", add_help=False, allow_abbrev=False)
        self.add_argument("paths", nargs="*")
        for option in switches:
            self.add_argument(option, action="store_true")
        for option in once:
            self.add_argument(option, action=_Once)
        self.add_argument("-h", "--help", action="store_true")
        self._names, self._paths = [*once, *switches, "--help"], paths

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")

    def take_tolerances(self) -> "Parser":
        self.add_argument("--tolerance", action="append", default=[])
        self._names.append("--tolerance")
        return self

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises UserError for an unknown option, and for a name of a file that cannot be one."""
        given, unknown = self.parse_known_intermixed_args(list(argv))
        if unknown:
            name = unknown[0].partition("=")[0]
            raise UserError(f"Unknown option {name}{nearest(name, self._names)} ({self.prog} --help lists all)")
        for path in given.paths:
            self.check_name(self._paths, path)
        return given

    def check_name(self, what: str, path: str) -> None:
        if not path.strip() or "\0" in path:
            raise UserError(f"{self.prog}: {what} must name a file, not {path!r}")

    def reports(self, **paths: str | None) -> dict[str, str]:
        """The files of the reports by option, checked before the work, whose exit codes have other meanings."""
        reports = {f"--{name}": os.path.expanduser(path) for name, path in paths.items() if path is not None}
        for option, path in reports.items():
            self.check_name(option, path)
            if path.endswith("/"):
                raise UserError(f"{self.prog}: {option} must name a file, and {path} ends in a slash")
            output.prepare_file(Path(path), stream=True)
        return reports

    def check_reports(self, reports: Mapping[str, str], inputs: Iterable[Path]) -> None:
        """Raises UserError if a report would overwrite a file that is read, or the other report."""
        taken = {path.resolve(): f"{path}, which is compared" for path in inputs}
        for option, path in reports.items():
            place = Path(path).resolve()
            if destination.find(Path(path)).is_stream:
                continue
            if place in taken:
                raise UserError(f"{self.prog}: {option} {path} would replace {taken[place]}; give another name")
            taken[place] = f"the report of {option}"


class _Once(argparse.Action):
    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise UserError(f"{option} is given twice")
        setattr(namespace, self.dest, values)


def metrics(
    text: str | None, tolerances: Sequence[str], dumps: Sequence[Dump], default: tuple[str, ...] = JUDGED
) -> tuple[str, ...]:
    """The metrics of `--metric`, each of which a dump has. Raises UserError for a tolerance of a metric not judged."""
    if text is None:
        judged = default
    else:
        judged = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        names = {name: name.partition(".")[0] for dump in dumps for name in dump.metrics}
        known = {part for name, kind in names.items() for part in (name, kind) if kind in KINDS}
        for name in judged:
            if name not in known:
                near = nearest(name, known)
                raise UserError(f"--metric: the dumps have no metric '{name}'{near} ({', '.join(sorted(known))})")
    kinds = {name.partition(".")[0] for name in judged}
    for word in tolerances:
        if (kind := word.partition("=")[0]) not in kinds:
            raise UserError(f"--tolerance: {word} has no effect, since {kind} is not judged; add it to --metric")
    return judged


def tolerances(given: Sequence[str]) -> dict[str, Tolerance]:
    """The defaults, updated with the given tolerances; a given tolerance replaces both parts of its default."""
    found: dict[str, Tolerance] = {}
    for word in given:
        kind, _, text = word.partition("=")
        if kind not in KINDS:
            raise UserError(
                f"--tolerance: there is no metric '{kind}'{nearest(kind, KINDS)} (metrics: {', '.join(KINDS)})"
            )
        if kind in found:
            raise UserError(f"--tolerance: {kind} is given twice")
        parts: dict[str, float] = {}
        for part in text.lower().split(","):
            name, unit = ("relative", "%") if part.strip().endswith("%") else ("absolute", KINDS[kind][0].lower())
            if name in parts:
                raise UserError(
                    f"--tolerance: '{word}' gives two values of one kind; give one percentage and one amount"
                )
            parts[name] = _amount(part.strip(), unit, word)
        found[kind] = Tolerance(parts.get("relative", 0.0) / 100, parts.get("absolute", 0.0))
    return {**TOLERANCES, **found}


def _amount(text: str, unit: str, word: str) -> float:
    try:
        value = float(text.removesuffix(unit)) if text.endswith(unit) else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e12:
        raise UserError(f"--tolerance: '{word}' is not of the form total=2%, stage=10%,120ms or memory=64mb")
    return value


def confidence(text: str | None) -> float:
    try:
        value = 95.0 if text is None else float(text.removesuffix("%"))
    except ValueError:
        value = 0.0
    if not 50 <= value <= 99.99:
        raise UserError(f"--confidence: '{text}' is not a percentage between 50% and 99.99%")
    return value / 100
