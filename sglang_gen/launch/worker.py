"""The process of one rank: receives plans from the launcher over a pipe, carries them out, and reports the outcome.

It ignores Ctrl-C, which the launcher handles for all ranks. It ends when the pipe closes, which happens whenever the
launcher ends; on Linux the kernel also kills it then, even if it is stopped or waits for another rank.
"""

import ctypes
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sglang_gen import env, log, signals
from sglang_gen.errors import LostError, RunError, UserError, unexpected
from sglang_gen.signals import Terminated
from sglang_gen.types import Plan, Result

if TYPE_CHECKING:
    from sglang_gen.launch.kept_weights import KeptWeights

PATIENCE = 3.0  # seconds between SIGTERM and SIGKILL
TERMINATED = 143  # exit code of a rank that ended by SIGTERM
RECEIVED_SIGTERM = "Rank {rank} received SIGTERM from outside of the run"
PR_SET_PDEATHSIG = 1  # of Linux' prctl.h


@dataclass(frozen=True)
class Job:
    """One plan for one rank. `port` is the port of the launcher's store, `folder` the working directory."""

    plan: Plan
    rank: int
    port: int
    folder: str
    started: float
    keep: bool  # the weights, for the next plan


@dataclass(frozen=True)
class LogLine:
    level: int
    text: str


@dataclass(frozen=True)
class Done:
    result: Result | None


@dataclass(frozen=True)
class Failure:
    """Failure of a rank. `when` is a time of the monotonic clock, by which the launcher finds the first failure.

    `follows` marks a consequence of another rank's failure, which is never reported as the cause.
    """

    rank: int
    is_request: bool
    sentence: str
    trace: str
    when: float
    follows: bool = False


class _Channel:
    """Messages to the launcher from several threads; SIGTERM interrupts none of them halfway."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.lock = pipe, threading.Lock()
        self.rank: int | None = None
        self.sending = self.terminated = False  # of the main thread

    def send(self, message: Any) -> None:
        main = threading.current_thread() is threading.main_thread()
        with self.lock:
            self.sending = main
            try:
                self.pipe.send(message)
            finally:
                self.sending = False
        if main and self.terminated:
            self.terminated = False
            signals.raise_exception(signal.SIGTERM)


def main() -> int:
    """Carry out jobs until the pipe closes. Returns 1 after a failed job, which breaks the process group."""
    _die_with(int(sys.argv[2]))
    leaving = ready = False

    def terminate(signum: int, frame: Any) -> None:
        nonlocal leaving
        if not ready:  # there is nothing to clean up, and an exception during the import of torch aborts the process
            os._exit(TERMINATED)
        if not leaving:  # an exception during interpreter exit would not be caught
            leaving = True
            if channel.sending:
                channel.terminated = True
                return
            signals.raise_exception(signum)

    def discarded(unraisable: "sys.UnraisableHookArgs") -> None:
        nonlocal leaving
        leaving = leaving and not issubclass(unraisable.exc_type, Terminated)
        signals.send_again(unraisable)

    sys.unraisablehook = discarded
    signals.ignore_interrupts()  # the launcher blocked them
    signal.signal(signal.SIGTERM, terminate)
    env.collect_rarely()
    env.prepare_libraries()
    log.capture_warnings()
    channel = _Channel(Connection(int(sys.argv[1])))
    _report_sigterm(channel)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel.pipe, jobs), name="launcher", daemon=True).start()
    try:
        job = jobs.get()
        importlib.import_module("torch.distributed")
        from sglang_gen.launch.kept_weights import KeptWeights

        ready, kept = True, KeptWeights(keeps=True)
        while _serve(job, channel, kept):
            job = jobs.get()
        leaving = True
    except Terminated:
        return TERMINATED
    except OSError:  # the launcher has ended
        leaving = True
    return 1


def _die_with(launcher: int) -> None:
    """Have the kernel kill this process when the process `launcher` ends. On Linux; elsewhere only the pipe tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it had already ended
            os._exit(TERMINATED)


def _report_sigterm(channel: _Channel) -> None:
    """Report SIGTERM to the launcher at once, also while the main thread waits in a collective, and end if that takes
    long: Python runs its handlers in the main thread only.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def report() -> None:
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass
        if channel.rank is not None:
            sentence = RECEIVED_SIGTERM.format(rank=channel.rank)
            with suppress(OSError):  # the launcher has ended
                channel.send(Failure(channel.rank, False, sentence, "", time.monotonic()))
        time.sleep(PATIENCE)
        os._exit(TERMINATED)

    threading.Thread(target=report, name="sigterm", daemon=True).start()


def _receive(pipe: Connection, jobs: "queue.SimpleQueue[Job]") -> None:
    try:
        with suppress(EOFError, OSError):  # the launcher has ended
            while True:
                jobs.put(pipe.recv())
    finally:  # also after what this code cannot read: nobody would answer the launcher
        os.kill(os.getpid(), signal.SIGTERM)


class _Forward(logging.Handler):
    """Handler that sends log lines to the launcher, which writes them."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        self.send(LogLine(record.levelno, record.getMessage()))


def level(plan: Plan, rank: int) -> str:
    """Log level of a rank: the run's level on rank 0, `warning` on the first rank of each other data parallel group,
    whose warnings may concern its own images, and `error` elsewhere.
    """
    requested = plan.run.log_level.name
    if rank == 0 or requested == "error":
        return requested
    return "error" if rank % (plan.layout.ranks // plan.layout.dp) else "warning"


def _serve(job: Job, channel: _Channel, kept: "KeptWeights") -> bool:
    """Carry out one job; False where it failed."""
    channel.rank, send = job.rank, channel.send
    log.setup(level(job.plan, job.rank), _Forward(send))
    from sglang_gen.parallel import mesh

    try:
        with signals.heeded():
            result = _run(job, kept)
        send(Done(result))
    except (UserError, RunError) as error:
        send(_failure(job.rank, error, isinstance(error, UserError), str(error)))
        return False
    except Exception as error:  # noqa: BLE001 - the rank boundary: the launcher reports it in one sentence
        send(_failure(job.rank, error, False, unexpected(error)))
        return False
    finally:
        mesh.leave()  # after the failure is reported, because leaving makes other ranks fail
    return True


def _failure(rank: int, error: BaseException, is_request: bool, sentence: str) -> Failure:
    trace = "".join(traceback.format_exception(error))
    return Failure(rank, is_request, sentence, trace, time.monotonic(), isinstance(error, LostError))


def _run(job: Job, kept: "KeptWeights") -> Result | None:
    from sglang_gen.launch import rank
    from sglang_gen.parallel import mesh

    os.chdir(job.folder)
    minutes = job.plan.run.parallel.timeout_minutes
    with mesh.explained(f"Rank {job.rank}", minutes):
        several = job.plan.layout.ranks > 1
        joined = mesh.join(job.plan.layout, job.rank, job.port, job.plan.device, minutes) if several else mesh.Mesh()
        result = rank.run(job.plan, joined, job.started, kept if job.keep else None)
    mesh.leave()
    return result
