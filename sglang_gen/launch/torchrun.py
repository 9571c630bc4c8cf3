"""Under torchrun this process is one rank: nothing is started, and the ranks of all machines meet at torchrun's store.

Rank 0 carries out the command, alone until it has a plan, which it posts. The others wait for the plan or the end. The
first failure ends the run for everybody; it is said once on each machine, by the rank that failed and nobody else.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from sglang_gen import env, log
from sglang_gen.config.schema import DEGREES
from sglang_gen.errors import LostError, RunError, Terminated, UserError, ending
from sglang_gen.hub import resolve
from sglang_gen.launch import rank
from sglang_gen.launch.launcher import GRACE
from sglang_gen.launch.rendezvous import POLL, End, Meeting
from sglang_gen.launch.worker import PATIENCE, level
from sglang_gen.parallel import mesh
from sglang_gen.plan import degrees
from sglang_gen.types import Plan, Result

if TYPE_CHECKING:
    from sglang_gen.config.compose import Composed

WATCH = 0.25  # seconds between two looks of the watching thread


def fit(composed: "Composed", place: env.Torchrun, single: bool) -> "Composed":
    """The composed run with the ranks that are there, where it states no degree of parallelism.

    `single` says that it chooses the option of that name. Raises UserError where the run has another number of ranks.
    """
    run, sources = composed.run, composed.sources
    stated = {name for name in DEGREES if sources[f"parallel.{name}"] != "default"}
    if not stated and not single:
        run = replace(run, parallel=replace(run.parallel, num_gpus=place.ranks))
        sources = sources | {"parallel.num_gpus": "torchrun"}
    elif (ranks := degrees.infer(run.parallel, stated).ranks) != place.ranks:
        raise UserError(
            f"torchrun has started {_count(place.ranks, 'process', 'es')} and the run has {_count(ranks, 'rank', 's')};"
            f" make --nnodes times --nproc-per-node {ranks}, or choose a layout with --num-gpus {place.ranks}"
        )
    return replace(composed, run=run, sources=sources, place=place)


def _count(number: int, word: str, plural: str) -> str:
    return f"{number} {word}{plural if number != 1 else ''}"


def run(place: env.Torchrun, command: Callable[[], int], say: Callable[[BaseException], int]) -> int:
    """Take part in `command` as the rank that this process is; the exit code, which is the same on every rank.

    `say` is told the failure that ended the run where this process is to say it, and gives its exit code.
    """
    if place.rank > 0:
        log.setup("error")
    env.prepare_libraries()
    with _signals_kill():
        meeting, over = Meeting.join(place), threading.Event()
    watch = threading.Thread(target=_watch, args=(meeting.again(), over), name="torchrun", daemon=True)
    watch.start()
    try:
        end = _follow(meeting) if place.rank > 0 else meeting.end(End(command()))
        _ignore_sigterm()
        return _heard(end, place, say)
    except (Exception, KeyboardInterrupt, Terminated) as error:  # noqa: BLE001 - the rank boundary
        _ignore_sigterm()
        return _fail(meeting, error, say)
    finally:
        mesh.leave()  # only after a failure is said, since it makes the others fail and may take longer than is left
        if place.keeps_store:
            with suppress(LostError):
                meeting.gather("end heard", PATIENCE if place.rank == 0 else 0)
        over.set()
        watch.join(PATIENCE)  # the interpreter must not end while a thread is inside of torch


def lead(plan: Plan, started: float, place: env.Torchrun) -> Result:
    """Rank 0's part of a plan: hand it to the other ranks and carry it out. Raises what ends this rank."""
    meeting = Meeting.join(place)
    meeting.post(plan)
    result = _carry_out(plan, meeting, started)
    assert result is not None  # rank 0 always has one
    return result


def _follow(meeting: Meeting) -> End:
    """Another rank's part: wait for a plan, carry it out, wait for the end."""
    plan = None
    while (end := meeting.ended()) is None:
        if plan is None and (plan := meeting.plan()) is not None:
            started = time.perf_counter()
            _carry_out(replace(plan, card=resolve.find_weights(plan.run)), meeting, started)  # each machine has its own
        time.sleep(POLL)
    return end


def _carry_out(plan: Plan, meeting: Meeting, started: float) -> Result | None:
    place, minutes = meeting.place, plan.run.parallel.timeout_minutes
    _speak(plan, meeting)
    if plan.device == "cuda":
        mesh.use_gpu(place.local)
    meeting.gather("model found")  # it may have to be downloaded first
    with mesh.explained(_who(place), minutes):
        if place.ranks == 1:
            joined = mesh.Mesh()
        else:
            joined = mesh.form(plan.layout, place.rank, meeting.store, plan.device, minutes)
        return rank.run(plan, joined, started)


def _speak(plan: Plan, meeting: Meeting) -> None:
    """From here on several ranks may warn, each of pictures of its own; what several say is said once."""
    rank = meeting.place.rank
    if rank > 0:
        log.setup(level(plan, rank))
    if plan.layout.dp > 1 and level(plan, rank) != "error":
        log.ask_first(lambda number, text: number != logging.WARNING or meeting.is_first(text))


def _who(place: env.Torchrun) -> str:
    return f"Rank {place.rank} on {socket.gethostname()}"


def _fail(meeting: Meeting, error: BaseException, say: Callable[[BaseException], int]) -> int:
    """End the run with this rank's failure, and say it unless another rank's counts; the exit code."""
    place, (code, sentence) = meeting.place, ending(error)
    if place.rank > 0 and isinstance(error, Exception) and not sentence.startswith("Rank "):
        sentence = f"{_who(place)}: {sentence}"
    mine = End(code, sentence, place.rank, place.node)
    try:
        if isinstance(error, (LostError, Terminated)):  # perhaps only what follows from another's failure
            until = time.monotonic() + GRACE
            while meeting.ended() is None and time.monotonic() < until:
                time.sleep(POLL)
        end = meeting.end(mine)
    except LostError:  # torchrun has gone
        end = mine if place.rank == 0 else End(code)
    if end != mine:
        return _heard(end, place, say)
    if place.rank == 0 or not isinstance(error, Exception):
        return say(error)
    return say((UserError if code == 2 else RunError)(sentence))


def _heard(end: End, place: env.Torchrun, say: Callable[[BaseException], int]) -> int:
    """The exit code of an end that another rank has said. Its sentence is said once on each other machine too."""
    if end.sentence and end.node != place.node and place.local == 0:
        return say((UserError if end.code == 2 else RunError)(end.sentence))
    return end.code


def _ignore_sigterm() -> None:
    """From here on this process ends anyway, and torchrun's own wish that it does says nothing new."""
    with suppress(ValueError):  # not the main thread: the host program owns the signals
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _signals_kill() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end this process at once: torch waits deaf to handlers, and nothing needs undoing."""
    try:
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the host program owns the signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(meeting: Meeting, over: threading.Event) -> None:
    """End this process when the run has failed elsewhere or torchrun is gone, whatever its main thread waits for."""
    while not over.wait(WATCH):
        try:
            end = meeting.ended()
        except LostError:
            end = End(1)
        if end is None or end.code == 0:
            continue
        os.kill(os.getpid(), signal.SIGTERM)
        if not over.wait(PATIENCE):
            os._exit(end.code)
        return
