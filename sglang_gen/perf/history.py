"""The history of each recipe: the values of its metrics at each commit, and the commits that changed them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError
from sglang_gen.perf import baseline, busy_machine
from sglang_gen.perf.change_points import Change, Place, Rule, find
from sglang_gen.perf.compare import KINDS, Rules, location, tolerance_of, unit_of
from sglang_gen.perf.dump_reader import Dump, is_folder, json_files, parse_dump, parse_json
from sglang_gen.perf.statistics import geometric_mean


@dataclass(frozen=True)
class Revision:
    """A commit of a history; `name` is None for a dump of a program that is not in a checkout."""

    name: str | None
    date: str  # of its first dump
    dumps: int

    @property
    def short(self) -> str:
        if self.name is None:
            return self.date[:19].replace("T", " ")
        commit, dash, rest = self.name.partition("-")
        return f"{commit[:10]}{dash}{rest}"


@dataclass(frozen=True)
class Series:
    """A metric at the commits that have it: their indices, the geometric means of their dumps, and the changes.

    `Change.index` is an index of `values`.
    """

    metric: str
    unit: str
    commits: list[int]
    values: list[float]
    changes: list[Change]


@dataclass(frozen=True)
class History:
    """One recipe on one machine."""

    model: Any
    prompt: Any
    machine: str
    fingerprint: str | None
    commits: list[Revision]
    series: list[Series]
    is_adjusted: bool = False  # processor times are those at one speed of the machine


def read(paths: Iterable[str]) -> list[tuple[str, Dump]]:
    """The dumps in files and folders with the names of their machines: perf dumps, and baselines of perf check.

    A dump that is in several files counts once for each machine. Raises UserError.
    """
    found: dict[tuple[str, str], tuple[str, Dump]] = {}
    for path in map(Path, map(os.path.expanduser, paths)):
        is_there = is_folder(path)
        if is_there is None:
            raise UserError(f"{path} does not exist")
        files = json_files(path) if is_there else [path]
        dumps = [pair for file in files for pair in _read_file(file, path if is_there else None)]
        if not dumps:
            raise UserError(f"The folder {path} holds no perf dump and no baseline")
        for machine, dump in dumps:
            if dump.origin.date is None:
                raise UserError(f"{dump.path} has no timestamp, so it has no place in a history")
            found.setdefault((machine, dump.origin.identity), (machine, dump))
    return list(found.values())


def _read_file(path: Path, root: Path | None) -> list[tuple[str, Dump]]:
    """The dumps of a file with their machines; `root` is the folder that was named, None if the file itself was."""
    content = parse_json(path)
    if baseline.is_baseline(content):
        known = baseline.parse(path, content)
        folder = path.resolve().parent  # its name is the machine, also if the folder or the file was named
        machine = known.machine if folder.name == baseline.DEFAULT_FOLDER else folder.name
        return [(machine, dump) for dump in known.dumps]
    dump = parse_dump(path, content, strict=root is None)
    return [] if dump is None else [(baseline.machine_of(dump), dump)]


def histories(dumps: Iterable[tuple[str, Dump]], rules: Rules) -> list[History]:
    """One history for each machine and recipe, in the order of their first dumps."""
    recipes: dict[tuple[str, str], list[Dump]] = {}
    for machine, dump in dumps:
        recipes.setdefault((machine, dump.recipe), []).append(dump)
    return [_history(machine, group, rules) for (machine, _), group in recipes.items()]


def _history(machine: str, dumps: Sequence[Dump], rules: Rules) -> History:
    commits: dict[str, list[Dump]] = {}
    ordered = sorted(dumps, key=lambda dump: dump.origin.date or "")
    adjusted = busy_machine.at_mean_speed(ordered) if rules.judges(busy_machine.CPU) else None
    for dump in adjusted or ordered:
        commits.setdefault(dump.origin.commit or dump.origin.identity, []).append(dump)
    groups = list(commits.values())
    names = dict.fromkeys(name for dump in dumps for name in dump.metrics if rules.judges(name))
    first = dumps[0]
    return History(
        model=first.meta["model"],
        prompt=first.meta["prompt"],
        machine=machine,
        fingerprint=first.fingerprint,
        commits=[Revision(group[0].origin.commit, group[0].origin.date or "", len(group)) for group in groups],
        series=[
            _series(name, groups, rules)
            for name in sorted(names, key=lambda name: list(KINDS).index(name.partition(".")[0]))
        ],
        is_adjusted=adjusted is not None,
    )


def _series(name: str, groups: Sequence[Sequence[Dump]], rules: Rules) -> Series:
    places: dict[int, Place] = {}
    for index, group in enumerate(groups):
        values = [location(name, dump.metrics[name]) for dump in group if name in dump.metrics]
        if values:
            places[index] = Place(geometric_mean(values), len(values))
    found = find(list(places.values()), Rule(lambda base: tolerance_of(name, base, rules), rules.confidence))
    return Series(name, unit_of(name), list(places), [place.value for place in places.values()], found)
