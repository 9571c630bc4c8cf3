"""The files that a run starts from, by their content, so that a record cannot repeat a run from others unnoticed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from sglang_gen.config.flags import BY_PATH
from sglang_gen.config.schema import Run, get
from sglang_gen.errors import RunError

FILES = ("sampling.image_path", "sampling.latents")


def digests(run: Run) -> dict[str, str]:
    """The SHA-256 of each file by the setting that names it. Raises RunError for one that is gone."""
    return {path: _digest(str(name)) for path in FILES if (name := get(run, path)) is not None}


def changed(run: Run, sources: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    """A warning for each file that the record names and that holds something else than it did."""
    found = []
    for path, digest in recorded.items():
        name = get(run, path) if path in FILES and sources.get(path) == "file" else None
        if name is not None and Path(name).expanduser().is_file() and _digest(name) != digest:
            option = BY_PATH[path].option if path in BY_PATH else path
            found.append(f"{option}: {name} is not the file that the record was made with")
    return found


def _digest(name: str) -> str:
    try:
        return hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{name} cannot be read: {error.strerror}") from error
