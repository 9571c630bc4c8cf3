"""Repeats of all jobs of a sweep in turn (perf.interleave), so that a drift of the machine affects all jobs alike."""

import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_gen import files, log
from sglang_gen.config.compose import Composed
from sglang_gen.config.schema import Quality, Tracking
from sglang_gen.errors import RunError, UserError
from sglang_gen.launch.session import Session
from sglang_gen.signals import Terminated
from sglang_gen.sweep.multirun import Job
from sglang_gen.sweep.note import Note
from sglang_gen.sweep.pace import step_time
from sglang_gen.types import Result


def first_round(composed: Composed) -> Composed:
    """The run that makes a job's images: the job without its repeats."""
    run = deepcopy(composed.run)
    run.perf.repeat = 1
    return replace(composed, run=run)


@dataclass(frozen=True)
class Begun:
    """A job that has made its images, and is not completed before its repeats."""

    job: Job
    composed: Composed
    note: Note
    result: Result

    @property
    def rounds(self) -> int:
        return self.composed.run.perf.repeat

    def repeat(self, session: Session) -> None:
        """Make the images again, in a folder that is removed, and add the times to the perf dump.

        Raises the errors of `generate.execute`.
        """
        from sglang_gen.generate import execute

        with tempfile.TemporaryDirectory() as folder:
            run = first_round(self.composed).run
            run.output.path, run.output.perf_dump_path = folder, str(Path(folder, "perf.json"))
            run.quality = Quality(manifest=run.quality.manifest)  # which has the prompts
            run.tracking, run.perf.trace = Tracking(), False
            again = execute(replace(self.composed, run=run, notices=()), session)
        assert again is not None  # the first round was no dry run
        for index, (frames, others) in enumerate(zip(self.result.frames, again.frames, strict=True)):
            if not (frames == others).all():
                log.warning(f"{self.job.name}: sample {index} differs when it is generated again")
        self.result.report["repeats"] += again.report["repeats"]
        files.save_json(Path(str(self.composed.run.output.perf_dump_path)), self.result.report)


class Rounds:
    """The jobs of a sweep that take turns."""

    def __init__(self) -> None:
        self.begun: list[Begun] = []

    def add(self, begun: Begun) -> None:
        begun.note.pause()
        self.begun.append(begun)

    def finish(self, session: Session) -> dict[Path, Exception]:
        """Repeat the jobs in turn until all are completed. Returns the errors of those that failed, by folder."""
        failed: dict[Path, Exception] = {}
        for number in range(2, 1 + max((each.rounds for each in self.begun), default=0)):
            for each in self.begun:
                if number <= each.rounds and each.job.folder not in failed:
                    log.info(f"{each.job.name}, repeat {number} of {each.rounds}")
                    try:
                        with each.note.resumed():
                            each.repeat(session)
                    except (UserError, RunError) as error:
                        failed[each.job.folder] = error
                    except (KeyboardInterrupt, Terminated) as stop:
                        self._abandon("terminated" if isinstance(stop, Terminated) else "interrupted")
                        raise
        for each in self.begun:
            self._conclude(each, failed.get(each.job.folder))
        return failed

    def _abandon(self, word: str) -> None:
        for each in self.begun:
            each.note.leave(word, f"The sweep was {word} before the last repeat of this job")

    @staticmethod
    def _conclude(each: Begun, error: Exception | None) -> None:
        each.note.leave("failed" if error else "completed", str(error) if error else None)
        if error:
            log.error(f"{each.job.name} failed: {error}")
        else:
            measured = step_time(each.result.report)
            log.info(f"{each.job.name} completed in {each.note.seconds:.3g} s{measured}")
