"""The prompts of a run in its records: a few stand in every record, many once beside the pictures.

A record repeats the whole run. With ten thousand prompts each of ten thousand records would hold a megabyte of the
others' prompts; such a run keeps them in `prompts_<hash>.jsonl`, which its records name. The hash is that of the
content, so that a record cannot repeat a run with other prompts than its own.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from sglang_gen import files
from sglang_gen.config.schema import Run, plain
from sglang_gen.errors import UserError

ARCHIVE_NAME = re.compile(r"prompts_[0-9a-f]{16}\.jsonl")
MOST_PROMPT_BYTES = 16_384  # bytes of prompts that a record holds itself


def recorded(run: Run) -> dict[str, Any]:
    """The run as its records hold it; its prompts are in the output folder afterwards where they are many.

    Raises RunError when they cannot be written.
    """
    content: dict[str, Any] = plain(run)
    data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in content["sampling"]["prompts"]).encode()
    if len(data) > MOST_PROMPT_BYTES:
        path = Path(run.output.path) / _name(data)
        if not path.is_file():
            files.save_bytes(path, data)
        content["sampling"] |= {"prompts": [], "prompts_file": path.name}
    return content


def beside(record: str | Path, name: str) -> str:
    """Path of the prompts that a record names. Raises UserError where they are gone or are not those of the record."""
    path = Path(record).parent / name
    if not ARCHIVE_NAME.fullmatch(name):
        raise UserError(f"{record} names {name} for its prompts, and a record's are in prompts_<hash>.jsonl beside it")
    if path.exists() and not path.is_file():
        raise UserError(f"The prompts of {record} cannot be read from {path}: it is no file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The prompts of {record} cannot be read from {path}: {error.strerror}") from None
    if path.name != _name(data):
        raise UserError(f"{path} does not hold the prompts of {record}: it was changed")
    return str(path)


def _name(data: bytes) -> str:
    return f"prompts_{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
