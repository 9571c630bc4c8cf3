"""Exceptions shown to the user, their exit codes, and suggestions for misspelled names."""

import difflib
import json
import os.path
import traceback
from collections.abc import Iterable

from sglang_gen.signals import Terminated

# Exceptions that libraries raise for unexpected files; each is reported as one sentence that names the component.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


class UserError(ValueError):
    """The request cannot be carried out as stated: one sentence, exit code 2."""


class InvalidValueError(ValueError):
    """A clause about a value ("is not an integer"), which the caller completes with the name of the setting."""


class RunError(RuntimeError):
    """The request was valid and the run failed: one sentence with the root cause, exit code 1."""


class LostError(RunError):
    """Another rank cannot be reached. Its own failure is the cause, so this error is shown only if no other one is."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """A clause that suggests the legal name closest to `name`, ignoring case; empty if no name is close."""
    spelled = {word.lower(): word for word in legal}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f"; did you mean '{spelled[close[0]]}'?" if close else ""


def in_our_words(error: BaseException) -> str:
    """A clause that says what a library's exception means: "X cannot be read: it is not UTF-8 text".

    Messages of libraries address developers, so they are shown with --log-level debug only. The caller chains the
    exception (`raise ... from error`), which is what the debug log prints.
    """
    match error:
        case UserError() | RunError() | InvalidValueError():
            return str(error)
        case OSError(strerror=str(text)) if error.errno is not None:
            return text
        case UnicodeError():
            return "it is not UTF-8 text"
        case json.JSONDecodeError():
            return f"it is not valid JSON in line {error.lineno}"
        case ImportError(name=str(name)):
            return f"the package {name.partition('.')[0]} is missing or has an unsupported version"
        case FileNotFoundError():
            return "it does not exist"
        case RecursionError():
            return "it is nested too deeply"
        case MemoryError():
            return "memory ran out"
    if is_out_of_memory(error):
        return "memory ran out"
    return "--log-level debug shows why"


def unexpected(error: BaseException) -> str:
    """The sentence for an exception that no code expected: the last line of this package that it passed through."""
    folder = os.path.dirname(__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    where = f" in {os.path.relpath(frames[-1].filename, folder)}, line {frames[-1].lineno}," if frames else ""
    return f"An unexpected error{where} ended the run (--log-level debug shows it)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's GPU allocator has its own exception class, others are told by their message."""
    text = str(error)
    words = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(word in text for word in words)


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the one-sentence message of an error that ends the command."""
    match error:
        case UserError():
            return 2, str(error)
        case RunError():
            return 1, str(error)
        case KeyboardInterrupt():
            return 130, "; ".join(["Interrupted", *getattr(error, "__notes__", ())])
        case Terminated():
            return 143, "; ".join(["Terminated", *getattr(error, "__notes__", ())])
    return 1, unexpected(error)
