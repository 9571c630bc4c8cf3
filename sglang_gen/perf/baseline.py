"""Baselines: observations of earlier dumps, in one JSON file per machine and fingerprint that git can hold.

`FOLDER/MACHINE/MODEL-FINGERPRINT.json` has the recipe, and one line for each dump with its commit, date and values, in
the order of time. Keys of the recipe are sorted, and metrics have the order of the dump, so that git shows a new dump
as one new line.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_gen import files
from sglang_gen.errors import UserError
from sglang_gen.perf.dump_reader import Dump, Origin, parse_json

BASELINE_VERSION = 1
KEPT = 50  # dumps of a baseline, unless another number is given
_FIELDS = {"baseline_version", "machine", "meta", "fingerprint", "observations"}


@dataclass(frozen=True)
class Baseline:
    """The observations of one recipe on one machine, as dumps in the order of time."""

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
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--baseline: {folder} is not a folder")
    return [read_file(path) for path in sorted(folder.rglob("*.json")) if not path.name.startswith(".")]


def is_baseline(content: Any) -> bool:
    return isinstance(content, dict) and content.keys() >= _FIELDS


def read_file(path: Path) -> Baseline:
    """Raises UserError for a file that is not a baseline, is broken, or was written by a newer version."""
    return parse(path, parse_json(path))


def parse(path: Path, content: Any) -> Baseline:
    """The baseline in the parsed JSON of a file. Raises UserError as `read_file` does."""
    if not is_baseline(content):
        raise UserError(f"{path} is not a baseline of sglang perf check")
    if content["baseline_version"] != BASELINE_VERSION:
        raise UserError(
            f"{path} has baseline version {content['baseline_version']}, this program reads version {BASELINE_VERSION}"
        )
    try:
        dumps = [_dump(path, content, entry) for entry in content["observations"]]
        machine = str(content["machine"])
    except (TypeError, AttributeError, KeyError, ValueError):
        raise UserError(f"{path} cannot be read: its observations do not have the layout of a baseline") from None
    if not dumps:
        raise UserError(f"{path} has no observations; delete it")
    return Baseline(path, machine, dumps)


def _dump(path: Path, content: Mapping[str, Any], entry: Mapping[str, Any]) -> Dump:
    metrics = {name: [float(value) for value in values] for name, values in entry["metrics"].items()}
    if not all(metrics.values()) or not all(0 <= value < 1e15 for values in metrics.values() for value in values):
        raise ValueError("a value is missing or out of range")
    return Dump(
        path=path,
        meta=dict(content["meta"]),
        fingerprint=content["fingerprint"]["hash"],
        fields=dict(content["fingerprint"]["fields"]),
        metrics=metrics,
        images=entry["images"],
        origin=Origin(entry["commit"], str(entry["date"]), str(entry["id"]), ()),
    )


def add(baseline: Baseline | None, dumps: Sequence[Dump], folder: Path, keep: int, anew: bool) -> Baseline:
    """The baseline with these dumps of its recipe, and the `keep` newest of all; with `anew` without its own.

    A dump that the baseline has counts once. A new baseline is in `folder`, which has the name of the machine. Raises
    UserError for a dump without a date.
    """
    for dump in dumps:
        if dump.origin.date is None:
            raise UserError(f"{dump.path} has no timestamp, so it cannot be added to a baseline")
    old = baseline.dumps if baseline and not anew else []
    by_identity = {dump.origin.identity: dump for dump in (*old, *dumps)}
    ordered = sorted(by_identity.values(), key=lambda dump: (dump.origin.date or "", dump.origin.identity))
    path = baseline.path if baseline else folder / _file_name(dumps[0])
    return Baseline(path, folder.name, [replace(dump, path=path) for dump in ordered[-keep:]])


def _file_name(dump: Dump) -> str:
    short = dump.fingerprint or hashlib.sha256(dump.recipe.encode()).hexdigest()[:16]
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
