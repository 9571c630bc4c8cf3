"""Starts one process per rank and returns rank 0's result; a run on one rank stays in this process.

The launcher computes nothing. It owns the meeting point of the ranks, writes their log lines, and watches: the first
failure is the one that is shown, and no rank outlives the run.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from sglang_gen import env, log
from sglang_gen.errors import RunError, UserError
from sglang_gen.launch.worker import PATIENCE, Done, Failure, Job, LogLine
from sglang_gen.types import Plan, Result

# The working directory comes last: a queue.py of the user's is not the library's.
_WORKER = (
    "import sys; sys.path.sort(key=lambda path: not path); from sglang_gen.launch.worker import main; sys.exit(main())"
)
_HINTS: dict[int, str] = {
    signal.SIGKILL: "; it may have run out of memory",
    signal.SIGABRT: (
        "; on GPUs so ends one that meets an error of CUDA, and one that waits for another that has failed, or for "
        "longer than parallel.timeout_minutes"
    ),
}
GRACE = 1.0  # seconds in which other ranks may still say that they failed earlier


def launch(plan: Plan, started: float) -> Result:
    """Carry out the plan on its ranks. `started` is when the command turned to the model.

    Raises UserError or RunError: of the rank that failed first.
    """
    if plan.layout.ranks == 1:
        from sglang_gen.launch import rank
        from sglang_gen.parallel.mesh import Mesh

        result = rank.run(plan, Mesh(), started)
        assert result is not None  # rank 0 always has one
        return result
    with open_ranks(plan.layout.ranks, plan.device) as ranks:
        return ranks.run(plan, started)


@contextmanager
def open_ranks(count: int, device: str) -> "Iterator[Ranks]":
    """Processes that wait for a plan; gone at the end, whatever happens."""
    ranks = Ranks(count, device)
    try:
        yield ranks
    finally:
        ranks.stop()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end, and in processes that start inside until they let it come, which ranks do deaf to it.

    A rank would otherwise answer it with a traceback while its interpreter starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Ranks:
    """Processes, one a rank, and the pipe to each. They may carry out several plans, one after the other."""

    def __init__(self, count: int, device: str) -> None:
        self.device = device
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []
        self.speakers: dict[tuple[int, str], int] = {}  # the rank that first said a line
        threads = max(env.cpu_count() // count, 1) if device == "cpu" else None
        try:
            with _interrupts_held():
                for _ in range(count):
                    self._start(env.rank_variables(threads))
        except BaseException:
            self.stop()
            raise

    def _start(self, environment: dict[str, str]) -> None:
        """One more process."""
        ours, theirs = Pipe()
        self.pipes.append(ours)
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        )
        theirs.close()

    def run(self, plan: Plan, started: float) -> Result:
        """Carry out `plan` on the first `plan.layout.ranks` processes. After a failure the processes are of no use."""
        import torch.distributed as dist

        self.speakers = {}
        count = plan.layout.ranks
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        for rank, pipe in enumerate(self.pipes[:count]):
            try:
                pipe.send(Job(plan, rank, store.port, os.getcwd(), started))
            except OSError:
                raise RunError(self._lost(rank)) from None
        results = self._watch(count)
        assert results[0] is not None  # rank 0 always has one
        return results[0]

    def _watch(self, count: int) -> dict[int, Result | None]:
        """The results of all ranks. Raises what the first failed rank says."""
        results: dict[int, Result | None] = {}
        while len(results) < count:
            waiting = [pipe for rank, pipe in enumerate(self.pipes[:count]) if rank not in results]
            failures = [failure for message in self._read(waiting, None) if (failure := self._take(message, results))]
            if failures:
                self._raise_first(failures, waiting)
        return results

    def _take(self, message: tuple[int, Any], results: dict[int, Result | None]) -> Failure | None:
        """Act on one message; a failure is handed back."""
        rank, content = message
        match content:
            case LogLine(level, text):
                if self.speakers.setdefault((level, text), rank) == rank:  # several ranks may warn of the same
                    log.write(level, text)
            case Done(result):
                results[rank] = result
            case Failure():
                return content
            case None:  # it could not say: the cause, not a consequence
                return Failure(rank, False, self._lost(rank), "", 0.0, follows=self._was_aborted(rank))
        return None

    def _read(self, pipes: list[Connection], timeout: float | None) -> list[tuple[int, Any]]:
        """(rank, message) of every pipe that has one within `timeout` seconds; None for a rank that is gone."""
        found: list[tuple[int, Any]] = []
        ready = wait(pipes, timeout)
        for rank, pipe in enumerate(self.pipes):
            if pipe not in ready:
                continue
            try:
                found.append((rank, pipe.recv()))
            except (EOFError, OSError):
                found.append((rank, None))
        return found

    def _raise_first(self, failures: list[Failure], pipes: list[Connection]) -> NoReturn:
        """Wait a moment for ranks that failed before the failure that was seen first, then raise the earliest."""
        ignored: dict[int, Result | None] = {}
        until = time.monotonic() + GRACE
        failed = {failure.rank for failure in failures}
        while (left := until - time.monotonic()) > 0:
            waiting = [pipe for pipe in pipes if self.pipes.index(pipe) not in failed]
            for message in self._read(waiting, left) if waiting else []:
                if failure := self._take(message, ignored):
                    failures.append(failure)
                    failed.add(failure.rank)
            if not waiting:
                break
        first = min(failures, key=lambda failure: (failure.follows, failure.when))
        for line in first.trace.splitlines():
            log.write(logging.DEBUG, line)
        raise UserError(first.sentence) if first.is_request else RunError(first.sentence)

    def _was_aborted(self, rank: int) -> bool:
        """Whether it ended as NCCL ends those that wait for a rank that failed: what that rank says is the cause."""
        return self.device == "cuda" and self.processes[rank].wait() == -signal.SIGABRT

    def _lost(self, rank: int) -> str:
        """How a process ended that could not say so itself."""
        code = self.processes[rank].wait()
        if code < 0:
            return f"Rank {rank} was ended by signal {-code}{_HINTS.get(-code, '')}"
        return f"Rank {rank} ended with exit code {code} before it could say why"

    def stop(self) -> None:
        """End all processes: at once where they are idle, else within `PATIENCE` seconds."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + PATIENCE
        for process in self.processes:
            try:
                process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in self.pipes:
            pipe.close()
