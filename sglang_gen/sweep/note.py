"""`job.json`: the status of a job, its files, and the identity by which a resumed sweep keeps it."""

import datetime
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_gen import files
from sglang_gen.config.schema import SCHEMA_VERSION
from sglang_gen.report.job_reader import DUMP, NOTE
from sglang_gen.sweep import identity


class Note:
    """The note of one job. `open` writes it, so that no file of an earlier job in the folder is taken for its own."""

    def __init__(self, folder: Path, overrides: tuple[str, ...]) -> None:
        self.folder, self.overrides = folder, overrides
        self.dump, self.identity = DUMP, dict[str, Any]()
        self.started: float | None = time.perf_counter()
        self.spent, self.ran_at = 0.0, _now()
        self.reused = False  # whether the weights were in memory
        self.before = set(files.results(folder))
        self.is_open = False

    def open(self) -> None:
        """Write the note of a job that starts. Raises RunError if it cannot be written."""
        self.is_open = True
        self.leave("unfinished", None)

    def leave(self, status: str, error: str | None) -> None:
        """Write the note of a job that has ended. Raises RunError if it cannot be written."""
        names = [name for name in files.results(self.folder) if name not in self.before]
        note = {
            "schema_version": SCHEMA_VERSION,
            "overrides": list(self.overrides),
            "status": status,
            "error": error,
            "seconds": None if status == "unfinished" else round(self.seconds, 3),
            "files": names,
            "dump": self.dump,
            "kept": False,
            "reused": self.reused,
            "ran_at": self.ran_at,
            "contents": _contents(self.folder, names, self.dump) if status == "completed" else {},
            "identity": self.identity if status == "completed" else {},
        }
        files.save_json(self.folder / NOTE, note)

    @property
    def seconds(self) -> float:
        """Seconds that the job has taken, without imports and the start of ranks, which only some jobs pay."""
        return self.spent + (0.0 if self.started is None else time.perf_counter() - self.started)

    def loaded(self, load: Mapping[str, Any]) -> None:
        """Note how the job came to its weights: the entry `load` of its perf dump."""
        self.reused = load["reused"]
        self.spent -= load["imports_ms"] / 1000

    def pause(self) -> None:
        """The job waits for its turn."""
        self.spent, self.started = self.seconds, None

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Context in which the job runs again."""
        self.started = time.perf_counter()
        try:
            yield
        finally:
            self.pause()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _contents(folder: Path, results: list[str], dump: str) -> dict[str, str]:
    """Digest of each file that a completed job left: results, the files beside them, and the perf dump."""
    stems = {Path(name).stem for name in results}
    names = [path.name for path in sorted(folder.iterdir()) if path.stem in stems or path.name == dump]
    return {name: identity.file_digest(folder / name) for name in names if (folder / name).is_file()}


def completed(folder: Path) -> dict[str, Any] | None:
    """The note of the job that completed in this folder; None if there is none, or it is not readable."""
    path = folder / NOTE
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(note, dict) and note.get("status") == "completed" and isinstance(note.get("identity"), dict)
    return note if known else None


def why_again(folder: Path, note: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why a completed job has to run again, as a clause; None if it can be kept."""
    if clause := identity.change(note["identity"], now):
        return clause
    contents = note.get("contents", {})
    if note["dump"] not in contents:
        return "its perf dump is missing"
    for name, digest in contents.items():
        try:
            whole = identity.file_digest(folder / name) == digest
        except OSError:
            return f"{name} is missing"
        if not whole:
            return f"{name} is not the file that the job left"
    return None


def keep(folder: Path, note: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Mark the note of a completed job as kept by a resumed sweep. Raises RunError if it cannot be written."""
    files.save_json(folder / NOTE, {**note, "overrides": list(overrides), "kept": True})


def read_dump(folder: Path, note: dict[str, Any]) -> dict[str, Any]:
    """The perf dump of a job that is kept."""
    dump: dict[str, Any] = json.loads((folder / note["dump"]).read_text(encoding="utf-8"))
    return dump
