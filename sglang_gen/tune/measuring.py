"""Measures candidates: the generation of the first images of the manifest, compared with the reference."""

import math
import shutil
import tempfile
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_gen import files, log
from sglang_gen.config.compose import Composed
from sglang_gen.config.schema import SCHEMA_VERSION, LogLevel, Output, Perf, Tracking
from sglang_gen.errors import RunError, UserError, unexpected
from sglang_gen.launch import kept_reference
from sglang_gen.launch.session import Session
from sglang_gen.perf.dump_numbers import peak_memory
from sglang_gen.plan import make
from sglang_gen.report.job_reader import DUMP, NOTE
from sglang_gen.tune.candidate import Candidate, CandidateError, CandidateVerdict, Observation
from sglang_gen.tune.space import Space
from sglang_gen.types import Result


class Machine:
    """The bench of a search on this machine. Folders of `folder` have the images and the dump of each candidate."""

    def __init__(self, space: Space, folder: Path, session: Session, started: float) -> None:
        self.space, self.folder, self.session, self.started = space, folder, session, started
        self.images = space.images
        self.level = space.base.run.log_level
        self.reference: str | None = None  # folder of the reference images
        self.jobs: dict[Candidate, int] = {}  # number of the folder of each candidate
        self._reports: dict[Candidate, dict[str, Any]] = {}  # of the measurement with the most images

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def tell(self, line: str) -> None:
        log.info(line)

    def refusal(self, candidate: Candidate) -> str | None:
        return self.space.refusal(candidate)

    def slowness(self, candidate: Candidate) -> float | None:
        return self.space.slowness(candidate)

    def prepare(self) -> None:
        """Find or make the images of the reference. Raises RunError."""
        stated = self.space.stated_reference
        if stated is not None:
            self.reference = stated
            return
        composed = self.space.reference()
        plan = make.make_plan(composed, self.space.card)
        self.reference = kept_reference.with_reference(composed, plan, self.session).reference

    def effective(self, candidate: Candidate) -> dict[str, Any]:
        """The settings that took effect in the largest measurement of a candidate."""
        return dict(self._reports.get(candidate, {}).get("effective", {}))

    def measure(self, candidate: Candidate, images: int) -> Observation:
        started = time.perf_counter()
        known = self._reports.get(candidate)
        is_larger = known is None or images > len(known["samples"])
        try:
            if is_larger:
                result = self._generate(candidate, images, self._own_folder(candidate))
                self._keep(candidate, result, time.perf_counter() - started)
            else:
                with tempfile.TemporaryDirectory() as place:
                    result = self._generate(candidate, images, Path(place))
                self._add_repeat(candidate, result, images)
        except UserError as error:
            raise self._lost(candidate, CandidateVerdict.REFUSED, str(error)) from error
        except RunError as error:
            raise self._lost(candidate, CandidateVerdict.FAILED, str(error)) from error
        except Exception as error:  # an unexpected error of one candidate must not end the search
            raise self._lost(candidate, CandidateVerdict.FAILED, unexpected(error)) from error
        finally:
            log.setup(self.level.name)
        return _observation(result.report, images, time.perf_counter() - started, self.space.options.by_processor)

    def _generate(self, candidate: Candidate, images: int, folder: Path) -> Result:
        from sglang_gen.generate import execute

        composed = self.run_of(candidate, images)
        composed.run.output.path = str(folder)
        result = execute(composed, self.session)
        assert result is not None  # no dry run
        return result

    def run_of(self, candidate: Candidate, images: int) -> Composed:
        """The run that generates the first images of a candidate, after an untimed warm-up of one whole image.

        A warm-up of fewer steps would leave shapes uncompiled that only later steps have, such as those without
        guidance.
        """
        planned = self.space.planned(candidate)
        run, compiling = deepcopy(planned.composed.run), planned.composed.run.compile
        steps = compiling.warmup_steps if compiling.warmup_steps > 1 else run.sampling.num_inference_steps
        run = replace(
            run,
            compile=replace(compiling, warmup=True, warmup_steps=steps),
            output=Output(),
            perf=Perf(work=False, machine_rates=False),
            tracking=Tracking(),
            log_level=LogLevel.debug if self.level is LogLevel.debug else LogLevel.error,
        )
        run.quality.reference = self.reference
        if images < self.images:
            samples = [sample for batch in planned.plan.batches for sample in batch][:images]
            entries = [{"prompt": one.prompt, "seed": one.seed} |
                       ({} if one.negative_prompt is None else {"negative_prompt": one.negative_prompt})
                       for one in samples]  # fmt: skip
            run.sampling = replace(run.sampling, prompt=None, prompts=entries, prompts_file=None, num_samples=1)
            run.quality.manifest = None  # whose digest is that of all its lines
        return replace(planned.composed, run=run, notices=(), warnings=(), in_sweep=True)

    def _own_folder(self, candidate: Candidate) -> Path:
        """The folder of a candidate, without what an earlier measurement left in it."""
        folder = self.folder / str(self.jobs.setdefault(candidate, len(self.jobs)))
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _keep(self, candidate: Candidate, result: Result, seconds: float) -> None:
        self._reports[candidate] = result.report
        self._write(candidate, "completed", None, [path.name for path in result.paths], seconds)

    def _add_repeat(self, candidate: Candidate, result: Result, images: int) -> None:
        """Add the times of another measurement of as many images to the dump."""
        report = self._reports[candidate]
        if images == len(report["samples"]):
            report["repeats"] += result.report["repeats"]
            files.save_json(self.folder / str(self.jobs[candidate]) / DUMP, report)

    def _lost(self, candidate: Candidate, status: CandidateVerdict, reason: str) -> CandidateError:
        self._write(candidate, status, reason, [], None)
        return CandidateError(status, reason)

    def _write(
        self, candidate: Candidate, status: str, reason: str | None, names: list[str], seconds: float | None
    ) -> None:
        """Write the note and the dump of a candidate, which a report reads like those of a sweep's job."""
        folder = self.folder / str(self.jobs.setdefault(candidate, len(self.jobs)))
        note = {"schema_version": SCHEMA_VERSION, "label": str(candidate), "overrides": list(candidate.words),
                "status": status, "error": reason, "seconds": seconds and round(seconds, 3), "files": names,
                "dump": DUMP}  # fmt: skip
        files.save_json(folder / NOTE, note)
        if status == "completed":
            files.save_json(folder / DUMP, self._reports[candidate])


def _observation(report: dict[str, Any], images: int, wall: float, by_processor: bool) -> Observation:
    """Time, quality and memory of a perf dump. Elapsed time is without saving."""
    first = report["repeats"][0]
    milliseconds = first["cpu_duration_ms" if by_processor else "total_duration_ms"]
    worst = report["quality"]["summary"]["psnr"]["worst"]
    peaks = peak_memory(report)
    memory = peaks.get("peak_device_mb", peaks.get("peak_host_mb"))
    return Observation(
        seconds=milliseconds / 1000 / images,
        psnr=math.inf if worst is None else worst["value"],
        memory=None if memory is None else memory * 2**20,
        wall=wall,
        elapsed=first["total_duration_ms"] / 1000 / images,
        worst=worst,
    )
