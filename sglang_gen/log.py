"""Logging in the format of the documented command (`INFO: ...` on stderr), and progress as a bar or as lines."""

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

_LOGGER = logging.getLogger("sglang_gen")
# Loggers of libraries: their messages address developers, and our own sentences say what concerns a result.
_LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "torchao", "torch.utils._pytree", "py.warnings", "optuna")
# Line ends, terminal control characters, those that reorder a line, and surrogates from bytes that are not UTF-8.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{_CONTROLS}]+")
_UNSEEN = re.compile(rf"(?![\n\t])[{_CONTROLS}]")
LONGEST, LONGEST_WORD = 399, 120  # characters of a line, and of a word in a line that is longer
PROGRESS_SECONDS = 5.0  # minimum interval between progress lines when stderr is not a terminal


class _Stderr(logging.StreamHandler[Any]):
    """Writes to the current sys.stderr, so that redirection works."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


class _OneLine(logging.Formatter):
    """`LEVEL: message` on one line; control characters become spaces, and a value of thousands of letters is cut."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        line = _CONTROL.sub(" ", super().formatMessage(record))
        return line if record.levelno <= logging.DEBUG else _cut(line)


def _cut(line: str) -> str:
    """`line` without the middle of a very long value. A list of many options stays whole."""
    if len(line) <= LONGEST:
        return line
    line = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:60]}...{word[0][-40:]}", line)
    return line if len(line) <= 4 * LONGEST else f"{line[:240]} ... {line[-150:]}"


def visible(text: str) -> str:
    """`text` with control characters, except for line ends and tabs, escaped as in JSON."""
    return _UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def encodable(text: str, encoding: str) -> str:
    """`visible` text for a stream; if the encoding lacks a character, those beyond ASCII are escaped as in JSON."""
    text = visible(text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return re.sub(r"[^\x00-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)
    return text


class _ForDebugging(logging.Handler):
    """Shows a library's record at level debug only, once, with the library's name: `DEBUG: diffusers: ...`.

    Libraries repeat a message for every block and batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if not _LOGGER.isEnabledFor(logging.DEBUG):
            return
        library = "Python" if record.name == "py.warnings" else record.name.partition(".")[0]
        line = f"{library}: {record.getMessage()}"
        if line not in self.seen:
            self.seen.add(line)
            _LOGGER.debug(line, exc_info=record.exc_info)


_FOR_DEBUGGING = _ForDebugging()
_warned: set[str] = set()


def setup(level: str, handler: logging.Handler | None = None) -> None:
    """Log our lines to stderr from `level` upwards, and messages of libraries at level debug only.

    Call again to change the level. `handler` replaces stderr.
    """
    _LOGGER.handlers = [handler or _handler()]
    _LOGGER.propagate = False
    _LOGGER.setLevel(level.upper())
    _warned.clear()
    _FOR_DEBUGGING.seen.clear()
    adopt_libraries()


@contextmanager
def redirected(handler: logging.Handler) -> Iterator[None]:
    """Context in which `handler` takes our lines in place of stderr."""
    before, _LOGGER.handlers = _LOGGER.handlers, [handler]
    try:
        yield
    finally:
        _LOGGER.handlers = before


def ask_first(may_say: Callable[[int, str], bool]) -> None:
    """Until the next `setup`, drop every line for which `may_say(level, text)` is False."""
    _LOGGER.handlers[0].addFilter(lambda record: may_say(record.levelno, record.getMessage()))


def capture_warnings() -> None:
    """Route Python warnings and the records of all libraries without handlers to the debug log.

    For the command's own processes only, not for callers of `generate`.
    """
    logging.captureWarnings(True)
    root = logging.getLogger()
    if _FOR_DEBUGGING not in root.handlers:
        root.addHandler(_FOR_DEBUGGING)  # without one Python writes warnings to stderr


def adopt_libraries() -> None:
    """Route the libraries' loggers to the debug log. Call again after importing them, which installs handlers.

    Loggers of torch that TORCH_LOGS makes more talkative keep their own handlers.
    """
    known = logging.root.manager.loggerDict.items()
    torchs = [
        name
        for name, logger in known
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == "torch" and logger.handlers
        if logger.level in (logging.NOTSET, logging.WARNING)
    ]
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.propagate = False
        library.setLevel(logging.DEBUG if _LOGGER.isEnabledFor(logging.DEBUG) else logging.CRITICAL)
    for name in (*_LIBRARIES, *torchs):
        logging.getLogger(name).handlers = [_FOR_DEBUGGING]


def _handler() -> logging.Handler:
    handler = _Stderr()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    return handler


def debug(message: str) -> None:
    _LOGGER.debug(message)


def info(message: str) -> None:
    _LOGGER.info(message)


def warning(message: str) -> None:
    _LOGGER.warning(message)


def warn_once(message: str) -> None:
    """Log a warning once until the next `setup`, for conditions that recur in every batch, repeat or file read."""
    if message not in _warned:
        _warned.add(message)
        _LOGGER.warning(message)


def error(message: str) -> None:
    _LOGGER.error(message)


def write(level: int, message: str) -> None:
    """Log a line received from another process."""
    _LOGGER.log(level, message)


def shorten(text: str, length: int = 100) -> str:
    """`text` on one line, truncated to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def quantity(number: int, noun: str) -> str:
    """`1 dump`, `2 dumps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Progress:
    """Denoising progress of one batch: a bar on a terminal, `Progress: 40% [20/50 steps]` lines elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._last = time.monotonic()
        self._bar: AbstractContextManager[Any] = nullcontext()
        self._task: Any = None
        if sys.stderr.isatty() and _LOGGER.isEnabledFor(logging.INFO):
            self._bar = _rich_bar()

    def __enter__(self) -> "Progress":
        bar = self._bar.__enter__()
        if bar is not None:
            self._task = bar.add_task("", total=self.total)
        return self

    def step(self) -> None:
        """Record one completed denoising step."""
        self.done += 1
        if self._task is not None:
            self._bar.advance(self._task)  # type: ignore[attr-defined]
        elif self.done < self.total and time.monotonic() - self._last > PROGRESS_SECONDS:
            self._line()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._bar.__exit__(kind, value, trace)
        if kind is None:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        info(f"Progress: {100 * self.done // max(self.total, 1)}% [{self.done}/{self.total} steps]")


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
