"""Runs the jobs of a multirun, each in its own folder with its images, records, perf dump and a note of its status."""

import dataclasses
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sglang_gen import log
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import Composed, compose
from sglang_gen.config.schema import Run, Sweep
from sglang_gen.errors import RunError, UserError, unexpected
from sglang_gen.launch.session import Session
from sglang_gen.outputs import dump_path
from sglang_gen.perf import objective
from sglang_gen.report.job_reader import DUMP, read_note
from sglang_gen.signals import Terminated
from sglang_gen.sweep import identity, note, sweep_folder
from sglang_gen.sweep.multirun import Ended, Job, Multirun, prepare
from sglang_gen.sweep.note import Note
from sglang_gen.sweep.pace import Pace, step_time
from sglang_gen.sweep.rounds import Begun, Rounds, first_round
from sglang_gen.types import Result


class JobRefusedError(RunError):
    """A job's request cannot be carried out, see `UserError`."""


@dataclass
class Shared:
    """What the jobs that run in one process share."""

    session: Session | None = None  # None: Hydra's launcher runs each job in another process
    told: set[str] = field(default_factory=set)  # notices of earlier jobs, which are not repeated
    pace: Pace = field(default_factory=Pace)
    rounds: Rounds = field(default_factory=Rounds)
    failed: dict[Path, Exception] = field(default_factory=dict)  # in a later round, by folder

    def finish(self) -> None:
        """Make the repeats of jobs that take turns."""
        if self.session is not None:
            self.failed = self.rounds.finish(self.session)

    def late(self, job: Ended) -> Ended:
        """The job with its result after all rounds."""
        return dataclasses.replace(job, result=self.failed.get(job.folder, job.result))


@contextmanager
def _shared(multirun: Multirun) -> Iterator[Shared]:
    session = Session() if multirun.in_process else None
    try:
        yield Shared(session)
    finally:
        if session is not None:
            session.close()


def run_sweep(choices: Choices, argv: Sequence[str] = ()) -> int:
    """Run all jobs. Returns the exit code. A failed or refused job does not stop the others.

    An optimizing sweeper decides itself whether to continue, see `run_job`. `argv` are the words of the command, for
    the sentence about an interrupted sweep.
    """
    multirun = prepare(choices)
    folder = multirun.folder
    command = sweep_folder.command(argv, folder, multirun.named)
    with sweep_folder.locked(folder):
        seed = sweep_folder.shared_seed(folder, multirun.settings.resume)
        sweep_folder.save(folder, seed, command)
        try:
            with _shared(multirun) as shared:
                ended = multirun.run(partial(run_job, shared=shared), seed, shared.finish)
        except (KeyboardInterrupt, Terminated) as stop:
            stop.add_note(sweep_folder.continuation(folder, command))
            raise
    return _conclude([shared.late(job) for job in ended], multirun.settings)


def _conclude(ended: Sequence[Ended], settings: Sweep) -> int:
    """Log how many jobs succeeded. Returns the exit code."""
    refused = sum(isinstance(job.result, JobRefusedError) for job in ended)
    failed = sum(isinstance(job.result, Exception) for job in ended) - refused
    succeeded = [job for job in ended if not isinstance(job.result, Exception)]
    notes = [read_note(job.folder) for job in succeeded]
    kept = sum(note.get("kept", False) for note in notes)
    line = f"Multirun: {len(succeeded)} of {len(ended)} jobs succeeded"
    line += f" ({kept} kept)" if kept else ""
    log.info(
        ", ".join([line, *(f"{count} {word}" for word, count in (("refused", refused), ("failed", failed)) if count)])
    )
    if failed or not settings.skip_refused:
        return 1 if failed or refused else 0
    return 0 if succeeded or not ended else 1


def run_job(job: Job, shared: Shared) -> float | None:
    """Run one job, or keep its results of an earlier run of the sweep. Returns the number in its perf dump that
    perf.objective names, for an optimizing sweeper.

    Raises RunError if the job fails or is refused, so that the sweeper's trial fails. The error message is logged and
    written to the job's note.
    """
    log.info(f"{job.name}: {' '.join(job.overrides)}")
    own, status = Note(job.folder, job.overrides), "failed"
    try:
        composed = _compose(job, shared.told)
        own.identity = identity.identify(composed)
        if (earlier := _kept(job, own)) is not None:
            note.keep(job.folder, earlier, job.overrides)
            log.info(f"{job.name} kept: completed at {earlier.get('ran_at')}")
            return _score(composed, note.read_dump(job.folder, earlier) if composed.run.perf.objective else None)
        own.dump = Path(str(composed.run.output.perf_dump_path)).name
        if not composed.run.dry_run:
            own.open()
        result, takes_turns = _execute(composed, own, shared)
        if result is not None and takes_turns:
            shared.rounds.add(Begun(job, composed, own, result))
            return None
        report = None if result is None else result.report
        status, score, error = "planned" if report is None else "completed", _score(composed, report), None
    except UserError as refusal:
        status, error = "refused", str(refusal)
        log.debug(traceback.format_exc())
    except RunError as failure:
        status, error = "failed", str(failure)
        log.debug(traceback.format_exc())
    except (KeyboardInterrupt, Terminated) as stop:
        word = "terminated" if isinstance(stop, Terminated) else "interrupted"
        if own.is_open:  # else the folder may hold a completed job
            own.leave(word, f"The sweep was {word} in this job")
        raise
    except Exception as failure:  # noqa: BLE001 - an unexpected error in one job must not end the sweep
        status, error = "failed", unexpected(failure)
        log.debug(traceback.format_exc())
    own.leave(status, error)
    if error is not None:
        raise _failure(job, status, error)
    shared.pace.seconds.append(own.seconds)
    measured = step_time(report) if report is not None else ""
    log.info(f"{job.name} {status} in {own.seconds:.3g} s{measured}{shared.pace.left(job.number, job.total)}")
    return score


def _failure(job: Job, status: str, error: str) -> RunError:
    """Log why a job did not succeed. Returns the error for the sweeper."""
    sentence = f"{job.name} {status}: {error}"
    if status == "refused":
        (log.warning if job.settings.skip_refused else log.error)(sentence)
        return JobRefusedError(sentence)
    log.error(sentence)
    return RunError(sentence)


def _compose(job: Job, told: set[str]) -> Composed:
    """Compose a job's run, with the output paths of its folder and the notices that no earlier job had."""
    composed = compose(job.choices, job.loader)
    new = tuple(notice for notice in composed.notices if notice not in told)
    told.update(new)
    _place(composed.run, job)
    return dataclasses.replace(composed, in_sweep=True, notices=new)


def _kept(job: Job, own: Note) -> dict[str, Any] | None:
    """The note of the job that completed in this folder, if its results are those that this job would have."""
    if not job.settings.resume or (earlier := note.completed(job.folder)) is None:
        return None
    clause = note.why_again(job.folder, earlier, own.identity)
    if clause is not None:
        log.info(f"{job.name} runs again: {clause}")
    return earlier if clause is None else None


def _execute(composed: Composed, own: Note, shared: Shared) -> tuple[Result | None, bool]:
    """Carry out a job, or its first round. Returns its result (None for a dry run), and whether rounds follow."""
    from sglang_gen.generate import execute

    takes_turns = _takes_turns(composed, shared)
    result = execute(first_round(composed) if takes_turns else composed, shared.session)
    if result is not None:
        own.loaded(result.report["load"])
    return result, takes_turns


def _takes_turns(composed: Composed, shared: Shared) -> bool:
    """Whether the job's repeats are made in turn with those of other jobs. Raises UserError where they cannot be."""
    perf = composed.run.perf
    if not perf.interleave or composed.run.dry_run:
        return False
    if shared.session is None:
        raise UserError("perf.interleave needs Hydra's basic launcher, which runs all jobs in one process")
    if perf.objective is not None:
        raise UserError(
            "perf.interleave and perf.objective exclude each other: an optimizer waits for each job's number"
        )
    if perf.repeat < 2:
        raise UserError("perf.interleave takes the repeats of all jobs in turn: set perf.repeat to 2 or more")
    return True


def _score(composed: Composed, report: dict[str, Any] | None) -> float | None:
    """The number of a perf dump that perf.objective names; None without one. Raises RunError if the dump has none."""
    key = composed.run.perf.objective
    if report is None or key is None:
        return None
    score = objective.value(report, key)
    log.info(f"Objective {key}: {score}")
    return score


def _place(run: Run, job: Job) -> None:
    """Set the job's output paths to its folder; the perf dump keeps its name or is called `perf.json`."""
    run.output.path = str(job.folder)
    name = run.output.perf_dump_path or DUMP
    dump_path.check_in_sweep(name)
    run.output.perf_dump_path = str(job.folder / name)
