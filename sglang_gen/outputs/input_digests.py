"""Digests of a run's input files, so that repeating a record with changed files is noticed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from sglang_gen.config import manifest
from sglang_gen.config.flags import BY_PATH
from sglang_gen.config.schema import Run, get
from sglang_gen.errors import RunError

FILES = ("sampling.image_path", "sampling.latents", "cache.plan_file")


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of each input file, by the config path that names it, and the digest of a manifest.

    Raises RunError for a missing file."""
    found = {path: _digest(str(name)) for path in FILES if (name := get(run, path)) is not None}
    if run.quality.manifest is not None:
        found[manifest.SETTING] = manifest.read(run.quality.manifest).digest
    return found


def changed(run: Run, sources: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    """A warning for each input file of the record whose content has changed."""
    messages = []
    for path, digest in recorded.items():
        name = get(run, path) if path in FILES and sources.get(path) == "file" else None
        if name is not None and Path(name).expanduser().is_file() and _digest(name) != digest:
            option = BY_PATH[path].option if path in BY_PATH else path
            messages.append(f"{option}: {name} is not the file that the record was made with")
    return messages


def _digest(name: str) -> str:
    try:
        return hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{name} cannot be read: {error.strerror}") from error
