"""The two kinds of failure that a user meets, and the words for a near miss."""

import difflib
from collections.abc import Iterable

# What libraries raise for files that are not what they expect; each becomes one sentence that names the component.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


class UserError(ValueError):
    """The request cannot be carried out as stated: one sentence, exit code 2."""


class RunError(RuntimeError):
    """The request was legal and the run failed: one sentence with the root cause, exit code 1."""


class LostError(RunError):
    """Another rank cannot be reached: what follows from its end, and worth saying only where nothing says more."""


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like KeyboardInterrupt so that nothing half-written stays."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """Half a sentence that names the closest legal spelling of `name`, or nothing. Case does not count."""
    spelled = {word.lower(): word for word in legal}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f"; did you mean '{spelled[close[0]]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a class for its own allocator on a GPU, others say it in words."""
    text = str(error)
    words = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(word in text for word in words)


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the one sentence with which an error ends the command."""
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
