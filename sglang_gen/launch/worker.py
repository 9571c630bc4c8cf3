"""The process of one rank: receives plans from the launcher over a pipe, carries them out, and reports the outcome.

It ignores Ctrl-C, which the launcher handles for all ranks. It ends when the pipe closes, which happens whenever the
launcher ends.
"""

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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sglang_gen import env, log
from sglang_gen.errors import LostError, RunError, Terminated, UserError, unexpected
from sglang_gen.types import Plan, Result

PATIENCE = 3.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Job:
    """One plan for one rank. `port` is the port of the launcher's store, `folder` the working directory."""

    plan: Plan
    rank: int
    port: int
    folder: str
    started: float


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


def main() -> int:
    """Carry out jobs until the pipe closes. Returns 1 after a failed job, which breaks the process group."""
    leaving = ready = False

    def terminate(signum: int, frame: Any) -> None:
        nonlocal leaving
        if not ready:  # there is nothing to clean up, and an exception during the import of torch aborts the process
            os._exit(143)
        if not leaving:  # an exception during interpreter exit would not be caught
            leaving = True
            raise Terminated

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the launcher blocked it
    signal.signal(signal.SIGTERM, terminate)
    env.collect_rarely()
    env.prepare_libraries()
    log.capture_warnings()
    pipe = Connection(int(sys.argv[1]))
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), name="launcher", daemon=True).start()
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            pipe.send(message)

    try:
        job = jobs.get()
        importlib.import_module("torch.distributed")
        ready = True
        while _serve(job, send):
            job = jobs.get()
        leaving = True
    except Terminated:
        return 143
    except OSError:  # the launcher has ended
        leaving = True
    return 1


def _receive(pipe: Connection, jobs: "queue.SimpleQueue[Job]") -> None:
    try:
        while True:
            jobs.put(pipe.recv())
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(143)


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


def _serve(job: Job, send: Callable[[Any], None]) -> bool:
    """Carry out one job; False where it failed."""
    log.setup(level(job.plan, job.rank), _Forward(send))
    from sglang_gen.parallel import mesh

    try:
        send(Done(_run(job)))
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


def _run(job: Job) -> Result | None:
    from sglang_gen.launch import rank
    from sglang_gen.parallel import mesh

    os.chdir(job.folder)
    minutes = job.plan.run.parallel.timeout_minutes
    with mesh.explained(f"Rank {job.rank}", minutes):
        joined = mesh.join(job.plan.layout, job.rank, job.port, job.plan.device, minutes)
        result = rank.run(job.plan, joined, job.started)
    mesh.leave()
    return result
