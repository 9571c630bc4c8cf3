"""Checks the path of a perf dump: it may be a stream, a new file or an earlier perf dump, but no other file."""

import json
import os
import re
from pathlib import Path

from sglang_gen import destination
from sglang_gen.errors import UserError
from sglang_gen.files import RESULT
from sglang_gen.outputs.trace_path import TRACE
from sglang_gen.perf.dump_reader import is_dump

KEY = "output.perf_dump_path"
RUNS = "runs.csv"  # file of tracking=csv
OF_A_SWEEP = re.compile(r"job\.json|table\..*|multirun\.yaml")


def check_dump_path(path: str) -> None:
    """Raises UserError for a path with the name of another kind of result, or one that would replace another file."""
    name = os.path.basename(path)
    if os.path.isdir(path):
        raise UserError(f"{KEY} is the folder {path}; it must name a JSON file")
    if not name:
        raise UserError(f"{KEY} is {path}, which ends in a slash; it must name a JSON file")
    if RESULT.fullmatch(name) or TRACE.fullmatch(name) or name == RUNS:
        raise UserError(f"{KEY} is {path}: names such as {name} are those of other results; give the dump another name")
    try:
        to = destination.find(Path(path))
        to.check_stream()
    except OSError as error:
        raise UserError(f"{KEY}: {path} cannot be written: {error.strerror}") from None
    if not to.is_stream and os.path.exists(path) and not _may_be_replaced(to.path):
        raise UserError(f"{KEY} is {path}, a file that is not a perf dump and would be lost; give another name")


def _may_be_replaced(path: Path) -> bool:
    """Whether the file is empty or a perf dump, of this package or of SGLang."""
    try:
        content = path.read_bytes() if path.is_file() else b"?"
        return not content or is_dump(json.loads(content))
    except (OSError, ValueError, RecursionError):
        return False


def check_ranks(path: str | None, ranks: int) -> None:
    """Raises UserError for a file descriptor above 2 if ranks are processes: they inherit only the standard ones."""
    number = destination.find(Path(path)).descriptor if path else None
    if ranks > 1 and number is not None and number > 2:
        raise UserError(f"{KEY}: {path} belongs to this process, and one of {ranks} ranks writes the dump; name a file")


def check_in_sweep(path: str) -> None:
    """Raises UserError unless `path` is a plain file name, which is not that of another result of a job."""
    whole, name = Path(path), os.path.basename(path)
    if whole.is_absolute() or len(whole.parts) != 1 or name in ("", "..") or name == RUNS or (
        RESULT.fullmatch(name) or TRACE.fullmatch(name) or OF_A_SWEEP.fullmatch(name)
    ):  # fmt: skip
        raise UserError(
            "In a multirun each job writes its own perf dump: give it a file name that no other result has, "
            f"not '{path}'"
        )
