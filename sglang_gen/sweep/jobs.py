"""Runs the jobs of a multirun, each in its own folder with its images, records, perf dump and a note of its status."""

import dataclasses
import secrets
import time
import traceback
from functools import partial
from pathlib import Path

from sglang_gen import files, log
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import Composed, compose
from sglang_gen.config.schema import SCHEMA_VERSION, Run
from sglang_gen.errors import RunError, UserError, unexpected
from sglang_gen.outputs import dump_path
from sglang_gen.perf import objective
from sglang_gen.report.job_reader import DUMP, NOTE
from sglang_gen.signals import Terminated
from sglang_gen.sweep.multirun import Job, multirun


def run_sweep(choices: Choices) -> int:
    """Run all jobs. Returns 0 if all succeeded, else 1. A failed job does not stop the others.

    An optimizing sweeper decides itself whether to continue, see `run_job`.
    """
    results = multirun(dataclasses.replace(choices, seed=secrets.randbelow(2**32)), partial(run_job, told=set()))
    failed = sum(isinstance(result, Exception) for result in results)
    log.info(f"Multirun: {len(results) - failed} of {len(results)} jobs succeeded")
    return 1 if failed else 0


def run_job(job: Job, told: set[str]) -> float | None:
    """Run one job. Returns the number in its perf dump that perf.objective names, for an optimizing sweeper.

    `told` holds the notices of earlier jobs in this process, which are not repeated.

    Raises RunError if the job fails, so that the sweeper's trial fails. The error message is logged and written to the
    job's note.
    """
    log.info(f"Job {job.number}: {' '.join(job.overrides)}")
    note, score = _Note(job), None
    try:
        composed = compose(job.choices)
        new = tuple(notice for notice in composed.notices if notice not in told)
        told.update(new)
        composed = dataclasses.replace(composed, in_sweep=True, notices=new)
        _place(composed.run, job)
        note.dump = Path(str(composed.run.output.perf_dump_path)).name
        status, score = _execute(composed)
        error = None
    except (UserError, RunError) as failure:
        status, error = "failed", str(failure)
        log.debug(traceback.format_exc())
    except (KeyboardInterrupt, Terminated) as stop:
        word = "terminated" if isinstance(stop, Terminated) else "interrupted"
        note.leave(word, f"The sweep was {word} in this job")
        raise
    except Exception as failure:  # noqa: BLE001 - an unexpected error in one job must not end the sweep
        status, error = "failed", unexpected(failure)
        log.debug(traceback.format_exc())
    if error:
        log.error(f"Job {job.number} failed: {error}")
    note.leave(status, error)
    if error:
        raise RunError(f"Job {job.number} failed: {error}")
    return score


def _execute(composed: Composed) -> tuple[str, float | None]:
    """Carry out a job. Returns its status, and its objective if perf.objective is set."""
    from sglang_gen.generate import execute

    result, key = execute(composed), composed.run.perf.objective
    if result is None:
        return "planned", None
    if key is None:
        return "completed", None
    score = objective.value(result.report, key)
    log.info(f"Objective {key}: {score}")
    return "completed", score


class _Note:
    """The job's status file, written when the job starts so that files of an earlier job are not taken for its own."""

    def __init__(self, job: Job) -> None:
        self.job, self.dump, self.started = job, DUMP, time.perf_counter()
        self.before = set(files.results(job.folder))
        self.leave("unfinished", None)

    def leave(self, status: str, error: str | None) -> None:
        """Write the note. Raises RunError if it cannot be written."""
        note = {
            "schema_version": SCHEMA_VERSION,
            "overrides": list(self.job.overrides),
            "status": status,
            "error": error,
            "seconds": None if status == "unfinished" else round(time.perf_counter() - self.started, 3),
            "files": [name for name in files.results(self.job.folder) if name not in self.before],
            "dump": self.dump,
        }
        files.save_json(self.job.folder / NOTE, note)


def _place(run: Run, job: Job) -> None:
    """Set the job's output paths to its folder; the perf dump keeps its name or is called `perf.json`."""
    run.output.path = str(job.folder)
    name = run.output.perf_dump_path or DUMP
    dump_path.check_in_sweep(name)
    run.output.perf_dump_path = str(job.folder / name)
