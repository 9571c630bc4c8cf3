"""Multirun: every job in its own folder, with its picture, its record, its perf dump and a note of how it ended."""

import dataclasses
import secrets
import time
import traceback
from pathlib import Path

from sglang_gen import log, output
from sglang_gen.config import Choices, Job, compose, multirun
from sglang_gen.errors import RunError, Terminated, UserError, first_line
from sglang_gen.schema import SCHEMA_VERSION, Run
from sglang_gen.sweep.report import DUMP, NOTE


def run_sweep(choices: Choices) -> int:
    """Run all jobs; 0 when all succeeded, 1 when one failed. A failed job does not stop the others."""
    sweep = dataclasses.replace(choices, seed=secrets.randbelow(2**32))
    log.info(f"Multirun: jobs without a seed use seed {sweep.seed}")
    codes = multirun(sweep, run_job)
    failed = sum(code != 0 for code in codes)
    log.info(f"Multirun: {len(codes) - failed} of {len(codes)} jobs succeeded")
    return 1 if failed else 0


def run_job(job: Job) -> int:
    """One job; its exit code. The sentence of a failure goes to the log and into the job's note."""
    from sglang_gen.generate import execute

    log.info(f"Job {job.number}: {' '.join(job.overrides)}")
    started, error, files, dump = time.perf_counter(), None, [], DUMP
    try:
        composed = compose(job.choices)
        _place(composed.run, job)
        dump = Path(str(composed.run.output.perf_dump_path)).name
        result = execute(composed)
        files = [path.name for path in result.paths] if result else []
    except (UserError, RunError) as failure:
        error = str(failure)
    except (KeyboardInterrupt, Terminated) as stop:
        word = "terminated" if isinstance(stop, Terminated) else "interrupted"
        _note(job, word, f"The sweep was {word} in this job", started, files, dump)
        raise
    except Exception as failure:  # noqa: BLE001 - a defect in one cell must not cost the sweep
        error = f"{type(failure).__name__}: {first_line(failure)}"
        log.debug(traceback.format_exc())
    if error:
        log.error(f"Job {job.number} failed: {error}")
    _note(job, "failed" if error else "completed", error, started, files, dump)
    return 1 if error else 0


def _note(job: Job, status: str, error: str | None, started: float, files: list[str], dump: str) -> None:
    """Leave word in the job's folder of how it ended. `started` is a time of time.perf_counter."""
    note = {
        "schema_version": SCHEMA_VERSION,
        "overrides": list(job.overrides),
        "status": status,
        "error": error,
        "seconds": round(time.perf_counter() - started, 3),
        "files": files,
        "dump": dump,
    }
    output.save_json(job.folder / NOTE, note)


def _place(run: Run, job: Job) -> None:
    """Everything that the job writes goes into its folder, the perf dump under its own name or `perf.json`."""
    run.output.path = str(job.folder)
    dump = Path(run.output.perf_dump_path or DUMP)
    if dump.is_absolute() or len(dump.parts) != 1 or dump.name in (NOTE, "", ".."):
        raise UserError(f"In a multirun each job writes its own perf dump: give it a name of its own, not '{dump}'")
    run.output.perf_dump_path = str(job.folder / dump)
