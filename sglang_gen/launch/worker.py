"""The process of one rank: takes plans from the launcher over a pipe, carries them out, and says how they ended.

It ignores Ctrl-C, which its launcher answers for all ranks, and ends with the
launcher: the pipe that closes when the launcher dies, however it dies, is the sign.
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
from sglang_gen.errors import LostError, RunError, Terminated, UserError, first_line
from sglang_gen.types import Plan, Result

PATIENCE = 3.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Job:
    """One plan for one rank: `port` is where the launcher's store listens, `folder` where relative paths start."""

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
    """How a rank failed. `when` is on the machine's monotonic clock, so that the first of several can be told.

    What `follows` from the end of another rank is never the cause.
    """

    rank: int
    is_request: bool
    sentence: str
    trace: str
    when: float
    follows: bool = False


def main() -> int:
    """Serve jobs until the launcher closes the pipe; 1 after a failed job, since its process group is broken."""
    leaving = ready = False

    def terminate(signum: int, frame: Any) -> None:
        nonlocal leaving
        if not ready:  # nothing to undo yet, and what is raised while torch is imported aborts the process
            os._exit(143)
        if not leaving:  # nobody catches what is raised while the interpreter ends
            leaving = True
            raise Terminated

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the launcher held it back
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
    except OSError:  # the launcher has gone
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
    """Sends log lines to the launcher, which writes them as its own."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        self.send(LogLine(record.levelno, record.getMessage()))


def level(plan: Plan, rank: int) -> str:
    """From which level a rank speaks: the first one as the run says; the first of a data parallel group warns.

    What it warns of may be a picture of its own.
    """
    asked = plan.run.log_level.name
    if rank == 0 or asked == "error":
        return asked
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
    except Exception as error:  # noqa: BLE001 - the rank boundary: the launcher says it in one sentence
        send(_failure(job.rank, error, False, f"{type(error).__name__}: {first_line(error)}"))
        return False
    finally:
        mesh.leave()  # only after a failure is said, since it makes the others fail
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
