"""Ctrl-C and SIGTERM of the command: silent before and after its work, an exception that ends the work during it.

Imports little, so that `leave_quietly` holds from the first milliseconds of the command on.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Terminated(BaseException):
    """SIGTERM was received; propagates like KeyboardInterrupt so that no partial file remains."""


_received: list[type[BaseException]] = []  # exceptions raised by the handlers of this command or rank
_heard: list[type[BaseException]] = []  # those of them that were raised again


def leave_quietly() -> None:
    """Let Ctrl-C end this process without a traceback, as it ends a C program. Ctrl-C that is ignored stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_command() -> bool:
    """Whether this process was started as the command: its script, or `python -m sglang_gen`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name in ("sglang", "sglang-gen") or (name == "-m" and "sglang_gen" in sys.orig_argv)


@contextmanager
def raised() -> Iterator[None]:
    """Context in which SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated.

    Outside of the main thread the host program owns the signals, and nothing changes.
    """
    _received.clear()
    _heard.clear()
    before: dict[int, Any] = {}
    try:
        if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
            before[signal.SIGINT] = signal.signal(signal.SIGINT, raise_exception)
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, raise_exception)
    except ValueError:  # not the main thread
        pass
    hook, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Context that blocks SIGINT, here and in processes started inside, until these unblock it with a handler set.

    Otherwise Ctrl-C would make a rank print a traceback while its interpreter starts, or while this process tells it
    what to do. A thread that does not block SIGINT, such as one of torch, may receive it, so the handler waits too.
    """
    import threading

    received: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    waits = callable(handler) and threading.current_thread() is threading.main_thread()
    try:
        if waits:
            signal.signal(signal.SIGINT, lambda number, _: received.append(number))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if waits:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def ignore_interrupts() -> None:
    """Ignore SIGINT in a process that was started in `interrupts_held`; the process that started it answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def raise_exception(number: int, frame: Any = None) -> NoReturn:
    """Handler of a signal that raises its exception, which `check` and `heeded` raise again where it is lost."""
    error = KeyboardInterrupt if number == signal.SIGINT else Terminated
    _received.append(error)
    raise error


def send_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send the signal again, a moment later, if its exception came up where Python discards one, as in a `__del__`.

    A `sys.unraisablehook`. The signal is not sent if `check` or `heeded` has raised its exception by then, which would
    be interrupted while it cleans up, or if another handler has been set.
    """
    if not issubclass(unraisable.exc_type, (KeyboardInterrupt, Terminated)):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGINT if issubclass(unraisable.exc_type, KeyboardInterrupt) else signal.SIGTERM
    handler, heard = signal.getsignal(number), len(_heard)
    import threading

    def send() -> None:
        if signal.getsignal(number) is handler and len(_heard) == heard:
            os.kill(os.getpid(), number)

    timer = threading.Timer(0.05, send)
    timer.daemon = True
    timer.start()


@contextmanager
def heeded() -> Iterator[None]:
    """Context that raises a signal's exception again where a library has lost it.

    Compiled code discards an exception that a handler raises inside it, or replaces it by an error of its own.
    """
    try:
        yield
    except Exception as error:
        if _received:
            _heard.append(_received[0])
            raise _received[0] from error
        raise
    check()


def check() -> None:
    """Raise the exception of a signal that was received before and discarded by a library."""
    if _received:
        _heard.append(_received[0])
        raise _received[0]


def forget_unhandled() -> None:
    """Have Python exit with the code that it is given, after a KeyboardInterrupt that was handled.

    Python exits by SIGINT instead if the exception left a script that C code ran, as torch does while it is imported.
    It notes so in a variable that the next script resets.
    """
    import ctypes

    ctypes.pythonapi.PyRun_SimpleString(b"")
