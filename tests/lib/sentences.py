"""Records the sentences that a test shows to a user, and finds those that a library wrote.

Every sentence is the message of a `UserError` or a `RunError`, or a line of our log; both are watched in this process.
Error lines of other processes are taken from what their commands left on stderr (`finished.Finished`).
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

from sglang_gen.errors import RunError, UserError

FOREIGN = (
    r"\b[A-Z]\w+(Error|Exception)\b",  # names of exceptions, and with them tracebacks
    r"Traceback",
    # torch
    r"expected scalar type|size mismatch|object has no attribute|object is not|NoneType|state_dict|meta tensor",
    r"[Tt]ensors? (a|on) device|mat1 and mat2|shapes cannot be multiplied|must match the size|Sizes of tensors",
    r"index out of range|not implemented for|CUDA error:|\[enforce fail|TORCH_\w+|torch\.compile'?d|aten::",
    # diffusers, transformers, safetensors, peft, huggingface_hub
    r"HeaderTooLarge|HeaderTooSmall|InvalidHeader|MetadataIncompleteBuffer|while deserializing|safetensors_rust",
    r"from_pretrained\(|from_single_file\(|low_cpu_mem_usage|ignore_mismatched_sizes|`\w+`|torch_dtype=",
    r"PeftConfig|Target modules|was not found in your environment|Couldn't connect|We couldn't",
    # omegaconf, Hydra's parser and Python
    r"omegaconf|Key '.*' not in|not in struct|Interpolation key|full_key|mismatched input|extraneous input|no viable",
    r"could not be converted to|got an unexpected keyword|missing \d+ required positional|unsupported operand",
    r"division by zero|list index|invalid literal|\[Errno|codec can't decode",
)
PATTERN = re.compile("|".join(FOREIGN))

seen: list[str] = []  # in the running test
_watching = False


def watch() -> None:
    """Record from now on; once in each process of the suite."""
    global _watching
    if _watching:
        return
    _watching = True
    for kind in (UserError, RunError):
        kind.__init__ = _noting(kind.__init__)  # type: ignore[method-assign]
    logging.getLogger("sglang_gen").addFilter(_note_line)


def _noting(original: Any) -> Any:
    def noting(self: BaseException, *words: Any) -> None:
        original(self, *words)
        seen.append(str(self))

    return noting


def _note_line(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING:
        seen.append(record.getMessage())
    return True


def note_stderr(text: str) -> None:
    """Record the error lines of a command."""
    seen.extend(line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR: "))


def foreign(sentences: Iterable[str]) -> list[str]:
    """The sentences with words of a library."""
    return [sentence for sentence in sentences if PATTERN.search(sentence)]
