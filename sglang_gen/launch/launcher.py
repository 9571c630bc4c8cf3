"""Starts one process per rank and returns rank 0's result; a run on one rank stays in this process.

The launcher itself computes nothing. It hosts the store for the rendezvous, writes the ranks' log lines, reports the
first failure, and ends all processes when the run ends.
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

from sglang_gen import env, log, signals
from sglang_gen.errors import RunError, UserError
from sglang_gen.launch.worker import PATIENCE, RECEIVED_SIGTERM, TERMINATED, Done, Failure, Job, LogLine
from sglang_gen.types import Plan, Result

# The working directory is last in sys.path, so that a user's queue.py does not shadow the standard library's.
_WORKER = (
    "import sys; sys.path.sort(key=lambda path: not path); from sglang_gen.launch.worker import main; sys.exit(main())"
)
_HINTS: dict[int, str] = {
    signal.SIGKILL: "; it may have run out of memory",
    signal.SIGABRT: (
        "; on GPUs this signal follows a CUDA error, the failure of another rank, or a wait of more than "
        "parallel.timeout_minutes"
    ),
}
GRACE = 1.0  # seconds in which other ranks may still report an earlier failure


def launch(plan: Plan, started: float, fresh: bool = False) -> Result:
    """Carry out the plan on its ranks. `started` is the time at which the command began to load the model.

    Raises the UserError or RunError of the rank that failed first.
    """
    if plan.layout.ranks == 1 and not fresh:
        return here(plan, started)
    with open_ranks(plan.layout.ranks, plan.device) as ranks:
        return ranks.run(plan, started)


def here(plan: Plan, started: float) -> Result:
    """Carry out a plan of one rank in this process."""
    from sglang_gen.launch import rank
    from sglang_gen.parallel.mesh import Mesh

    result = rank.run(plan, Mesh(), started)
    assert result is not None  # rank 0 always returns a result
    return result


@contextmanager
def open_ranks(count: int, device: str) -> "Iterator[Ranks]":
    """Context with processes that wait for a plan. They are ended on exit."""
    ranks = Ranks(count, device)
    try:
        yield ranks
    finally:
        ranks.stop()


def _name(number: int) -> str:
    """The name of a signal; real-time signals have numbers only."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


class Ranks:
    """One process per rank, and a pipe to each. They can carry out several plans in sequence."""

    def __init__(self, count: int, device: str) -> None:
        self.count, self.device = count, device
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []
        self.speakers: dict[tuple[int, str], int] = {}  # (level, line) -> the rank that logged it first
        threads = max(env.cpu_count() // count, 1) if device == "cpu" else None
        try:
            with signals.interrupts_held():
                for _ in range(count):
                    self._start(env.rank_variables(threads))
        except BaseException:
            self.stop()
            raise

    def _start(self, environment: dict[str, str]) -> None:
        """Start one process."""
        ours, theirs = Pipe()
        self.pipes.append(ours)
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        )
        theirs.close()

    def fit(self, plan: Plan) -> bool:
        """Whether the plan needs as many processes, which share the cores of a CPU, on the same kind of device."""
        return (self.count, self.device) == (plan.layout.ranks, plan.device)

    def run(self, plan: Plan, started: float, keep: bool = False) -> Result:
        """Carry out `plan` on the first `plan.layout.ranks` processes, which cannot be used again after a failure.

        `keep` has them keep the weights for the next plan.
        """
        from sglang_gen.parallel import mesh

        self.speakers = {}
        count, store = plan.layout.ranks, mesh.local_store()
        for rank, pipe in enumerate(self.pipes[:count]):
            try:
                pipe.send(Job(plan, rank, store.port, os.getcwd(), started, keep))
            except OSError:
                raise RunError(self._lost(rank)) from None
        results = self._watch(count)
        assert results[0] is not None  # rank 0 always returns a result
        return results[0]

    def _watch(self, count: int) -> dict[int, Result | None]:
        """Collect the results of all ranks. Raises the error of the rank that failed first."""
        results: dict[int, Result | None] = {}
        while len(results) < count:
            waiting = [pipe for rank, pipe in enumerate(self.pipes[:count]) if rank not in results]
            failures = [failure for message in self._read(waiting, None) if (failure := self._take(message, results))]
            if failures:
                self._raise_first(failures, waiting)
        return results

    def _take(self, message: tuple[int, Any], results: dict[int, Result | None]) -> Failure | None:
        """Process one message. Returns it if it is a failure."""
        rank, content = message
        match content:
            case LogLine(level, text):
                if self.speakers.setdefault((level, text), rank) == rank:  # several ranks may log the same warning
                    log.write(level, text)
            case Done(result):
                results[rank] = result
            case Failure():
                return content
            case None:  # the process died without a report, so it is taken as the cause
                return Failure(rank, False, self._lost(rank), "", 0.0, follows=self._was_aborted(rank))
        return None

    def _read(self, pipes: list[Connection], timeout: float | None) -> list[tuple[int, Any]]:
        """(rank, message) of every pipe with a message within `timeout` seconds; the message of a dead rank is None."""
        signals.check()  # wait() would not return
        messages: list[tuple[int, Any]] = []
        ready = wait(pipes, timeout)
        for rank, pipe in enumerate(self.pipes):
            if pipe not in ready:
                continue
            try:
                messages.append((rank, pipe.recv()))
            except (EOFError, OSError):
                messages.append((rank, None))
        return messages

    def _raise_first(self, failures: list[Failure], pipes: list[Connection]) -> NoReturn:
        """Wait `GRACE` seconds for failures that happened earlier than those received, then raise the earliest."""
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
        """Whether NCCL aborted the process, as it does when another rank failed; that rank's failure is the cause."""
        return self.device == "cuda" and self.processes[rank].wait() == -signal.SIGABRT

    def _lost(self, rank: int) -> str:
        """A sentence about a process that ended without a report."""
        code = self.processes[rank].wait()
        if code in (TERMINATED, -signal.SIGTERM):
            return RECEIVED_SIGTERM.format(rank=rank)
        if code < 0:
            return f"Rank {rank} was ended by {_name(-code)}{_HINTS.get(-code, '')}"
        return f"Rank {rank} ended with exit code {code} without an error message"

    def stop(self) -> None:
        """Terminate all processes, and kill those that have not ended after `PATIENCE` seconds."""
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
