"""Runs the sections of the report one after the other, each in a process of its own, within one budget of time.

A section that fails, hangs or leaves the GPU unusable ends its process and not the report. The processes are forked, so
that libraries are imported once, unless an import has asked CUDA for its devices: then a forked process cannot use it.
"""

import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch


class SkippedError(Exception):
    """Raised by a section that does not apply here; the message is the reason."""


@dataclass(frozen=True)
class Settings:
    """What a section measures on. `deadline` is the moment, of `time.monotonic`, by which its process must be done."""

    device: str
    size: str  # "full": published networks; "tiny": small ones, to see that the script works
    deadline: float = float("inf")

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Section:
    """A part of the report: `run` returns Markdown, in which FAILED marks failures; it gets at most `most` seconds."""

    title: str
    run: Callable[[Settings], str]
    most: float


@dataclass(frozen=True)
class Outcome:
    """What became of a section."""

    title: str
    result: str  # passed, failed or skipped
    seconds: float
    reason: str
    text: str


FAILED = "**failed**"  # marks what failed inside of a section that went on
GRACE = 5.0  # seconds between the deadline that a section is told and its end


def run_section(section: Section, settings: Settings, seconds: float) -> Outcome:
    """Run a section in a process of its own, which ends after at most `seconds`."""
    context: Any = multiprocessing.get_context(start_method())
    receiving, sending = context.Pipe(duplex=False)
    started = time.monotonic()
    told = Settings(settings.device, settings.size, started + seconds - GRACE)
    process = context.Process(target=_work, args=(section, told, sending))
    process.start()
    sending.close()
    try:
        answer = receiving.recv() if receiving.poll(seconds) else ("failed", f"took longer than {seconds:.0f} s", "")
    except EOFError:
        process.join()
        answer = ("failed", f"its process died with exit code {process.exitcode}", "")
    process.join(timeout=GRACE)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)  # with the commands that it started
        process.join()
    return Outcome(section.title, answer[0], time.monotonic() - started, answer[1], answer[2])


@functools.cache
def start_method() -> str:
    """ "fork", or "spawn" where torch refuses CUDA in a forked process."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    probe = context.Process(target=lambda: sending.send(torch.cuda._is_in_bad_fork()))
    probe.start()
    refused = receiving.recv()
    probe.join()
    return "spawn" if refused else "fork"


def _work(section: Section, settings: Settings, sending: Connection) -> None:
    os.setsid()  # a group of its own, which ends as a whole
    try:
        text = section.run(settings)
        lines = [line for line in text.splitlines() if FAILED in line]
        reason = f"{len(lines)} of its parts: {lines[0].strip('| ')}" if lines else ""
        answer = ("failed" if lines else "passed", reason, text)
    except SkippedError as reason:
        answer = ("skipped", str(reason), "")
    except BaseException as error:  # noqa: BLE001 - the boundary of a process: whatever fails is named in the report
        answer = ("failed", described(error), f"```text\n{traceback.format_exc()}```")
    sending.send(answer)
    sending.close()


def described(error: BaseException) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def run_all(sections: Sequence[Section], settings: Settings, budget: float) -> list[Outcome]:
    """Run the sections in order until `budget` seconds are spent; the remaining ones are skipped."""
    begun, outcomes = time.monotonic(), []
    for section in sections:
        left = budget - (time.monotonic() - begun)
        if left < 2 * GRACE:
            outcomes.append(Outcome(section.title, "skipped", 0.0, f"the budget of {budget:.0f} s is spent", ""))
            continue
        outcome = run_section(section, settings, min(left, section.most))
        print(f"{outcome.title}: {outcome.result} in {outcome.seconds:.0f} s {outcome.reason}", flush=True)
        outcomes.append(outcome)
    return outcomes


def report(outcomes: Sequence[Outcome], heading: str) -> str:
    """The whole report: a table of the sections, then the text of each."""
    lines = [f"# {heading}", "", "| section | result | s | reason |", "|---|---|---|---|"]
    lines += [f"| {o.title} | {o.result} | {o.seconds:.0f} | {o.reason.replace('|', '/')} |" for o in outcomes]
    parts = [f"## {outcome.title}\n\n{outcome.text}" for outcome in outcomes if outcome.text]
    return "\n".join([*lines, "", "\n\n".join(parts), ""])


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)])
