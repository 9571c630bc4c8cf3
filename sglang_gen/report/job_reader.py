"""Reads the jobs of a sweep, one `Row` each, from the files in their folders. Does not import Hydra."""

import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError, in_our_words
from sglang_gen.perf.dump_facts import facts
from sglang_gen.perf.dump_numbers import (
    ACCURACIES,
    QUALITY,
    Measure,
    energy_per_image,
    images_per_second,
    peak_memory,
    times,
)

NOTE, DUMP = "job.json", "perf.json"  # file names of a job's note and perf dump
TUNING_FILE = "tune.json"  # of `sglang tune`, in the folder of its candidates
# Keys of a note: the job was `kept` from an earlier run of the sweep, it `reused` the weights of an earlier job.
JOB_MARKS = ("kept", "reused")
RESULTS = (*QUALITY, *ACCURACIES, "identical", "verdict")  # of the entry `quality` of a dump


@dataclass(frozen=True)
class Row:
    """One job. `times` are seconds, `memory` is in MiB, `outputs` are paths relative to the sweep's folder."""

    job: str
    status: str
    overrides: tuple[str, ...] = ()
    error: str | None = None
    seconds: float | None = None
    outputs: tuple[str, ...] = ()
    times: Mapping[str, Measure] = field(default_factory=dict)
    images_per_second: Measure | None = None
    joules_per_image: Measure | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    requested: Mapping[str, str] = field(default_factory=dict)  # `parallel.tp_size` -> "2"
    effective: Mapping[str, str] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)  # what ran: `model`, `prompt` and others in words
    marks: tuple[str, ...] = ()  # those of JOB_MARKS that the job's note sets
    label: str | None = None  # how the note names the job, in place of its overrides
    dump: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the whole perf dump; empty if there is none


def read_jobs(folder: Path) -> list[Row]:
    """One row per job folder of the sweep in `folder`, in the order of the jobs. Failed jobs have `error` set.

    Raises UserError for a folder that cannot be read.
    """
    try:
        places = [
            place for place in folder.iterdir() if (place.is_dir() and place.name.isdigit()) or (place / NOTE).exists()
        ]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {in_our_words(error)}") from error
    places.sort(
        key=lambda place: (not place.name.isdigit(), int(place.name) if place.name.isdigit() else 0, place.name)
    )
    return [_read_job(place) for place in places]


def _read_job(place: Path) -> Row:
    note, problem = _read(place / NOTE)
    status: str = note.get("status", "unfinished")
    dump: dict[str, Any] = {}
    if status == "completed":  # a dump in the folder of an unfinished or failed job is from an earlier one
        dump, missing = _read(place / note.get("dump", DUMP))
        problem = missing if note.get("files") else problem
    samples = dump.get("samples") or []
    return Row(
        job=place.name,
        status=status,
        overrides=tuple(note.get("overrides", ())),
        error=note.get("error") or problem,
        seconds=note.get("seconds"),
        outputs=tuple(f"{place.name}/{name}" for name in note.get("files", ()) if os.path.exists(place / name)),
        times=times(dump),
        images_per_second=images_per_second(dump, len(samples)),
        joules_per_image=energy_per_image(dump),
        memory=peak_memory(dump),
        requested=_flattened(dump.get("requested") or {}),
        effective=_flattened(dump.get("effective") or {}),
        quality={name: value for name, value in (dump.get("quality") or {}).items() if name in RESULTS},
        facts=facts(dump),
        label=note.get("label"),
        marks=tuple(mark for mark in JOB_MARKS if note.get(mark) is True),
        dump=dump,
    )


def read_note(place: Path) -> dict[str, Any]:
    """The note in a job's folder; empty if there is none."""
    return _read(place / NOTE)[0]


def read_tuning_conclusion(folder: Path) -> list[str]:
    """The sentences in which `sglang tune` concluded on the candidates in a folder; none for the folder of a sweep."""
    found = _read(folder / TUNING_FILE)[0].get("conclusion")
    return [str(sentence) for sentence in found] if isinstance(found, list) else []


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """The JSON object in a file and None, or an empty dict and an error sentence."""
    try:
        if path.exists() and not path.is_file():  # reading a FIFO would block
            return {}, f"{path.name} is not a regular file"
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read: {in_our_words(error)}"
    return (content, None) if isinstance(content, dict) else ({}, f"{path.name} is not a JSON object")


def _flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested settings: `{"parallel": {"tp": 2}}` -> `{"parallel.tp": "2"}`."""
    if isinstance(value, Mapping):
        return {
            path: text for name, item in value.items() for path, text in _flattened(item, f"{prefix}.{name}").items()
        }
    return {prefix.lstrip("."): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
