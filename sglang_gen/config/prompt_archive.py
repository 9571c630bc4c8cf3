"""Storage of a run's prompts in its records: in each record if they are few, else in one file beside the images.

A record holds the whole run. With ten thousand prompts each of ten thousand records would hold a megabyte of prompts.
Such a run saves them once in `prompts_<hash>.jsonl`, which its records name. The hash is that of the content, so that
a record is never repeated with other prompts.
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
MOST_PROMPT_BYTES = 16_384  # most bytes of prompts that are stored in the record itself


def recorded(run: Run) -> dict[str, Any]:
    """The run as stored in its records. Many prompts are written to a file in the output folder.

    Raises RunError if that file cannot be written.
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
    """Path of the prompts file that a record names. Raises UserError if the file is missing or was changed."""
    path = Path(record).parent / name
    if not ARCHIVE_NAME.fullmatch(name):
        raise UserError(
            f"{record} names the prompts file {name}; it must be a prompts_<hash>.jsonl in the folder of the record"
        )
    if path.exists() and not path.is_file():
        raise UserError(f"The prompts of {record} cannot be read from {path}: it is not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The prompts of {record} cannot be read from {path}: {error.strerror}") from None
    if path.name != _name(data):
        raise UserError(f"{path} does not hold the prompts of {record}: it was changed")
    return str(path)


def _name(data: bytes) -> str:
    return f"prompts_{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
