"""Baselines: observations of earlier dumps, in one JSON file per machine and fingerprint that git can hold.

`FOLDER/MACHINE/MODEL-FINGERPRINT.json` has the recipe, and one line for each dump with its commit, date and values, in
the order of time. Keys of the recipe are sorted, and metrics have the order of the dump, so that git shows a new dump
as one new line.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_gen import files
from sglang_gen.errors import InvalidValueError, UserError, in_our_words
from sglang_gen.perf.dump_reader import (
    Dump,
    Origin,
    check_times,
    fingerprint_of,
    is_folder,
    json_files,
    number_of,
    parse_json,
    utc,
)

BASELINE_VERSION = 1
DEFAULT_FOLDER = "perf_baseline"  # with a folder for each machine
KEPT = 50  # dumps of a baseline, unless another number is given
_FIELDS = {"baseline_version", "machine", "meta", "fingerprint", "observations"}


@dataclass(frozen=True)
class Baseline:
    """The observations of one recipe on one machine, as dumps in the order of time.

    The machine is that of the folder of the file, which may have been renamed or copied.
    """

    path: Path
    machine: str
    dumps: list[Dump]

    @property
    def recipe(self) -> str:
        return self.dumps[0].recipe


def machine_of(dump: Dump) -> str:
    """A name for the hardware of a dump, such as `amd-epyc-7b13` or `4x-nvidia-h200`."""
    counts = Counter(dump.origin.hardware)
    return _slug(" ".join(f"{count}x {name}" if count > 1 else name for name, count in counts.items()), "unknown")


def _slug(text: str, otherwise: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or otherwise


def check_machine(name: str) -> str:
    """Raises UserError for a name that is not the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"--machine: '{name}' may have letters, digits, '.', '_' and '-' only, up to 100")
    return name


def read_folder(folder: Path) -> list[Baseline]:
    """The baselines in `folder`, in the order of their paths; none if it does not exist. Raises UserError."""
    if (is_there := is_folder(folder)) is None:
        return []
    if not is_there:
        raise UserError(f"--baseline: {folder} is not a folder")
    known: dict[tuple[str, str], Baseline] = {}
    paths = json_files(folder)
    machines = (path for path in folder.glob("*") if path.is_dir())
    if link := next((path for path in (*machines, *paths) if path.is_symlink()), None):
        raise UserError(f"{link} is a symbolic link, and what it names belongs to another machine; copy that instead")
    for path in paths:
        found = of_folder(parse(path, parse_json(path)), folder)
        other = known.setdefault((found.machine, found.recipe), found)
        if other is not found:
            raise UserError(f"{other.path} and {path} are baselines of one recipe and machine; delete one of them")
    return list(known.values())


def of_folder(found: Baseline, root: Path) -> Baseline:
    """A baseline that lies in `root`, with the machine that the folder inside of `root` is named after, if any."""
    return found if found.path.parent == root else replace(found, machine=found.path.parent.name)


def is_baseline(content: Any) -> bool:
    return isinstance(content, dict) and content.keys() >= _FIELDS


def parse(path: Path, content: Any) -> Baseline:
    """The baseline in the parsed JSON of a file.

    Raises UserError for a file that is not a baseline, is broken, or was written by a newer version.
    """
    if not is_baseline(content):
        raise UserError(f"{path} is not a baseline of sglang perf check")
    if content["baseline_version"] != BASELINE_VERSION:
        raise UserError(
            f"{path} has baseline version {content['baseline_version']}, this program reads version {BASELINE_VERSION}"
        )
    try:
        dumps = [_dump(path, content, entry) for entry in content["observations"]]
        machine = str(content["machine"])
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        own = isinstance(error, InvalidValueError)
        reason = in_our_words(error) if own else "its observations do not have the layout of a baseline"
        raise UserError(f"{path} cannot be read: {reason}") from None
    if not dumps:
        raise UserError(f"{path} has no observations; delete it")
    return Baseline(path, machine, dumps)


def _dump(path: Path, content: Mapping[str, Any], entry: Mapping[str, Any]) -> Dump:
    metrics = {name: [number_of(value, name) for value in values] for name, values in entry["metrics"].items()}
    check_times(metrics)
    hash_, fields = fingerprint_of(content["fingerprint"])
    meta, images, commit = content["meta"], entry["images"], entry["commit"]
    if "total" not in metrics or not all(metrics.values()) or not {"model", "prompt"} <= meta.keys():
        raise InvalidValueError("a value is missing")
    if images is not None and not (type(images) is int and images > 0):
        raise InvalidValueError(f"images is {json.dumps(images)[:40]}, not a number of images")
    if commit is not None and not isinstance(commit, str):
        raise InvalidValueError(f"commit is {json.dumps(commit)[:40]}, not a text")
    return Dump(
        path=path,
        meta=dict(meta),
        fingerprint=hash_,
        fields=fields,
        metrics=metrics,
        images=images,
        origin=Origin(commit, utc(entry["date"]), str(entry["id"]), ()),
    )


def add(baseline: Baseline | None, dumps: Sequence[Dump], folder: Path, keep: int, anew: bool) -> Baseline:
    """The baseline with these dumps of its recipe, and the `keep` newest of all; with `anew` without its own.

    A dump that the baseline has counts once. A new baseline is in `folder`, which has the name of the machine. Raises
    UserError for a dump without a date, and for a new baseline whose file exists.
    """
    for dump in dumps:
        if dump.origin.date is None:
            raise UserError(f"{dump.path} has no timestamp, so it cannot be added to a baseline")
    old = baseline.dumps if baseline and not anew else []
    by_identity = {dump.origin.identity: dump for dump in (*old, *dumps)}
    ordered = sorted(by_identity.values(), key=lambda dump: (dump.origin.date or "", dump.origin.identity))
    path = baseline.path if baseline else folder / _file_name(dumps[0])
    if baseline is None and os.path.lexists(path):
        raise UserError(f"{path} would be replaced, and is no baseline of the recipe of {dumps[0].path}; move it away")
    return Baseline(path, folder.name, [replace(dump, path=path) for dump in ordered[-keep:]])


def _file_name(dump: Dump) -> str:
    is_name = dump.fingerprint is not None and re.fullmatch(r"[A-Za-z0-9]{1,64}", dump.fingerprint)
    short = dump.fingerprint if is_name else hashlib.sha256(dump.recipe.encode()).hexdigest()[:16]
    model = _slug(Path(str(dump.meta.get("model"))).name, "model")
    return f"{model}-{short}.json"


def save(baseline: Baseline) -> None:
    """Write the file of a baseline. Raises RunError."""
    first = baseline.dumps[0]
    head = {
        "baseline_version": BASELINE_VERSION,
        "machine": baseline.machine,
        "meta": first.meta,
        "fingerprint": {"hash": first.fingerprint, "fields": first.fields},
    }
    text = json.dumps(head, indent=2, sort_keys=True, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"    {line}" for line in _lines(baseline.dumps))
    files.save_bytes(baseline.path, f'{text},\n  "observations": [\n{lines}\n  ]\n}}\n'.encode())


def _lines(dumps: Iterable[Dump]) -> Iterable[str]:
    for dump in dumps:
        entry = {"commit": dump.origin.commit, "date": dump.origin.date, "id": dump.origin.identity,
                 "images": dump.images, "metrics": dump.metrics}  # fmt: skip
        yield json.dumps(entry, ensure_ascii=False)
