"""The folder of a sweep: a lock that keeps a second sweep out, the seed that its jobs share, and how to continue it."""

import json
import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sglang_gen import files
from sglang_gen.config.schema import SCHEMA_VERSION
from sglang_gen.errors import RunError, UserError, in_our_words

SWEEP_FILE = "sweep.json"
LOCK = ".sweep.lock"
LONGEST_COMMAND = 300  # characters of a command in a log line, which may be cut above `log.LONGEST`


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other process runs a sweep in `folder`, which is created.

    The lock ends with the process, however it ends. Raises UserError if another process holds it, RunError if the
    folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK
    if path.is_symlink():  # older versions of filelock truncate the link's target
        raise RunError(f"The folder of the sweep cannot be written: {path} is a symbolic link")
    files.prepare_folder(folder)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another sweep is running in {folder}: wait until it has ended, or give this one another folder with "
            "--output-path"
        ) from None
    except OSError as error:
        raise RunError(f"The folder of the sweep cannot be locked: {in_our_words(error)}") from error
    try:
        yield
    finally:
        lock.release()


def shared_seed(folder: Path, resume: bool) -> int:
    """The seed of jobs without one: that of the sweep which is resumed, else a new one."""
    path = folder / SWEEP_FILE
    if resume and path.is_file():
        try:
            seed = json.loads(path.read_text(encoding="utf-8"))["seed"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or a file of something else
            seed = None
        if isinstance(seed, int) and 0 <= seed < 2**63:
            return seed
    return secrets.randbelow(2**32)


def save(folder: Path, seed: int, command: str) -> None:
    """Write `sweep.json`. Raises RunError."""
    files.save_json(folder / SWEEP_FILE, {"schema_version": SCHEMA_VERSION, "seed": seed, "continue": command})


def command(argv: Sequence[str], folder: Path, named: bool) -> str:
    """The command that continues a sweep; `named` says that `argv` gives the sweep its folder, and no date in it."""
    words = list(argv)
    if not named:
        quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
        plain = all(letter.isalnum() or letter in "/_-.:" for letter in str(folder))
        words = [word for word in words if not word.lstrip("+").startswith("hydra.sweep.dir=")]
        words.append(f"hydra.sweep.dir={folder if plain else f'{chr(34)}{quoted}{chr(34)}'}")
    return shlex.join(["sglang", "generate", *words])


def continuation(folder: Path, command: str) -> str:
    """A clause that says how to continue an interrupted sweep."""
    if len(command) > LONGEST_COMMAND:
        return f"continue with the command in {folder / SWEEP_FILE}"
    return f"continue with: {command}"
