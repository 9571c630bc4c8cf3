"""Runs the command as one rank under torchrun. No process is started; the ranks of all machines use torchrun's store.

Rank 0 runs the command and posts its plan; the other ranks wait for the plan or the end of the run. The first failure
ends the run on all ranks and is reported once on each machine.
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

from sglang_gen import env, log, signals
from sglang_gen.config.schema import DEGREES
from sglang_gen.errors import LostError, RunError, UserError, ending
from sglang_gen.hub import resolve
from sglang_gen.launch import rank
from sglang_gen.launch.launcher import GRACE
from sglang_gen.launch.rendezvous import POLL, End, Rendezvous
from sglang_gen.launch.worker import PATIENCE, level
from sglang_gen.parallel import mesh
from sglang_gen.plan import degrees
from sglang_gen.signals import Terminated
from sglang_gen.types import Plan, Result

if TYPE_CHECKING:
    from sglang_gen.config.compose import Composed

WATCH = 0.25  # seconds between polls of the watching thread
HEARING = 60.0  # seconds in which all ranks hear that the run has succeeded; a busy machine needs many


def fit(composed: "Composed", place: env.Torchrun, single: bool) -> "Composed":
    """The composed run with num_gpus set to torchrun's number of ranks if it sets no parallel degree.

    `single` means that the user chose parallel=single. Raises UserError if the run has another number of ranks.
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
    """Run `command` as this process's rank. Returns the exit code, which is the same on every rank.

    `say` reports the error that ended the run, if this process is the one to report it, and returns its exit code.
    """
    if place.rank > 0:
        log.setup("error")
    env.prepare_libraries()
    with _signals_kill():
        rendezvous, over = Rendezvous.join(place), threading.Event()
    watch = threading.Thread(target=_watch, args=(rendezvous.again(), over), name="torchrun", daemon=True)
    watch.start()
    patience = PATIENCE
    try:
        end = _follow(rendezvous) if place.rank > 0 else rendezvous.end(End(command()))
        patience = PATIENCE if end.code else HEARING
        _ignore_sigterm()
        return _heard(end, place, say)
    except (Exception, KeyboardInterrupt, Terminated) as error:  # noqa: BLE001 - the rank boundary
        _ignore_sigterm()
        return _fail(rendezvous, error, say)
    finally:
        mesh.leave()  # after the failure is reported, because leaving makes other ranks fail and may take long
        if place.keeps_store:
            with suppress(LostError):
                rendezvous.gather("end heard", patience if place.rank == 0 else 0)
        over.set()
        watch.join(PATIENCE)  # the interpreter must not exit while a thread is inside torch


def lead(plan: Plan, started: float, place: env.Torchrun) -> Result:
    """Send the plan from rank 0 to the other ranks and carry it out. Raises the error that ends this rank."""
    rendezvous = Rendezvous.join(place)
    rendezvous.post(plan)
    result = _carry_out(plan, rendezvous, started)
    assert result is not None  # rank 0 always returns a result
    return result


def _follow(rendezvous: Rendezvous) -> End:
    """Run a rank other than 0: wait for the plan, carry it out, and wait for the end of the run."""
    plan = None
    while (end := rendezvous.ended()) is None:
        signals.check()
        if plan is None and (plan := rendezvous.plan()) is not None:
            started = time.perf_counter()
            card = resolve.find_weights(plan.run)  # each machine has its own files
            _carry_out(replace(plan, card=card), rendezvous, started)
        time.sleep(POLL)
    return end


def _carry_out(plan: Plan, rendezvous: Rendezvous, started: float) -> Result | None:
    place, minutes = rendezvous.place, plan.run.parallel.timeout_minutes
    _speak(plan, rendezvous)
    if plan.device == "cuda":
        mesh.use_gpu(place.local)
    rendezvous.gather("model found")  # a machine may have to download the model first
    with mesh.explained(_who(place), minutes):
        if place.ranks == 1:
            joined = mesh.Mesh()
        else:
            joined = mesh.form(plan.layout, place.rank, rendezvous.store, plan.device, minutes)
        return rank.run(plan, joined, started)


def _speak(plan: Plan, rendezvous: Rendezvous) -> None:
    """Set the log level of this rank. Ranks of several data parallel groups may warn; equal warnings appear once."""
    rank = rendezvous.place.rank
    if rank > 0:
        log.setup(level(plan, rank))
    if plan.layout.dp > 1 and level(plan, rank) != "error":
        log.ask_first(lambda number, text: number != logging.WARNING or rendezvous.is_first(text))


def _who(place: env.Torchrun) -> str:
    return f"Rank {place.rank} on {socket.gethostname()}"


def _fail(rendezvous: Rendezvous, error: BaseException, say: Callable[[BaseException], int]) -> int:
    """End the run with this rank's failure, and report it unless another rank failed first. Returns the exit code."""
    place, (code, sentence) = rendezvous.place, ending(error)
    if place.rank > 0 and isinstance(error, Exception) and not sentence.startswith("Rank "):
        sentence = f"{_who(place)}: {sentence}"
    mine = End(code, sentence, place.rank, place.node)
    try:
        if isinstance(error, (LostError, Terminated)):  # possibly a consequence of another rank's failure
            until = time.monotonic() + GRACE
            while rendezvous.ended() is None and time.monotonic() < until:
                time.sleep(POLL)
        end = rendezvous.end(mine)
    except LostError:  # torchrun has ended
        end = mine if place.rank == 0 else End(code)
    if end != mine:
        return _heard(end, place, say)
    if place.rank == 0 or not isinstance(error, Exception):
        return say(error)
    return say((UserError if code == 2 else RunError)(sentence))


def _heard(end: End, place: env.Torchrun, say: Callable[[BaseException], int]) -> int:
    """The exit code of an outcome posted by another rank, whose sentence is reported once on each other machine."""
    if end.sentence and end.node != place.node and place.local == 0:
        return say((UserError if end.code == 2 else RunError)(end.sentence))
    return end.code


def _ignore_sigterm() -> None:
    """Ignore SIGTERM, which torchrun sends to processes that are already ending."""
    with suppress(ValueError):  # not the main thread: the host program owns the signals
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _signals_kill() -> Iterator[None]:
    """Context in which SIGINT and SIGTERM kill the process at once: torch's rendezvous blocks Python's handlers."""
    try:
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the host program owns the signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(rendezvous: Rendezvous, over: threading.Event) -> None:
    """Thread that ends this process when the run has failed on another rank or torchrun has ended."""
    while not over.wait(WATCH):
        try:
            end = rendezvous.ended()
        except LostError:
            end = End(1)
        if end is None or end.code == 0:
            continue
        os.kill(os.getpid(), signal.SIGTERM)
        if not over.wait(PATIENCE):
            os._exit(end.code)
        return
