"""Exceptions shown to the user, their exit codes, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable

from sglang_gen.signals import Terminated

# Exceptions that libraries raise for unexpected files; each is reported as one sentence that names the component.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


class UserError(ValueError):
    """The request cannot be carried out as stated: one sentence, exit code 2."""


class RunError(RuntimeError):
    """The request was valid and the run failed: one sentence with the root cause, exit code 1."""


class LostError(RunError):
    """Another rank cannot be reached. Its own failure is the cause, so this error is shown only if no other one is."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """A clause that suggests the legal name closest to `name`, ignoring case; empty if no name is close."""
    spelled = {word.lower(): word for word in legal}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f"; did you mean '{spelled[close[0]]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """The first non-empty line of the error's message, or the name of its class if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
            return 130, "Interrupted"
        case Terminated():
            return 143, "Terminated"
    return 1, f"{type(error).__name__}: {first_line(error)} (--log-level debug shows where)"
