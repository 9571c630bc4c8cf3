"""The quality of a run's images: prepared before anything is generated, and judged after the last image is saved."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_gen import log
from sglang_gen.config import manifest
from sglang_gen.config.schema import plain
from sglang_gen.errors import RunError, UserError
from sglang_gen.outputs.save import Saved
from sglang_gen.perf import attributes, blank_images, metrics, quality
from sglang_gen.plan import image_size
from sglang_gen.plan.quality_request import AUTO, about_images
from sglang_gen.types import Plan


@dataclass(frozen=True)
class Judge:
    """What the images of a run are compared with and measured by."""

    plan: Plan
    manifest: manifest.Manifest | None
    folder: str | None  # of the reference images
    references: list[Path] | None  # one for each sample
    metrics: dict[str, metrics.Metric]
    attributes: attributes.Attributes | None  # of the model, if its folder has them

    def judge(self, saved: Saved) -> dict[str, Any]:
        """The entry `quality` of the dump. Raises UserError for references that cannot be compared, RunError for a
        metric that fails."""
        report: dict[str, Any] = {"reference": None, "verdict": None}
        if self.references is None:
            entries = [
                {key: sample.get(key) for key in ("index", "prompt", "seed", "file")} for sample in saved.samples
            ]
            report |= {"summary": {}, "samples": entries}
        else:
            report |= quality.compare(str(self.folder), saved.samples, saved.frames, self.references)
        if self.manifest is not None:
            named = {"name": self.manifest.name, "digest": self.manifest.digest}
            report["manifest"] = named | {"samples": len(saved.samples)}
        if self.metrics or self.attributes:
            others = None if self.references is None else [quality.read_reference(path) for path in self.references]
            if self.metrics:
                report["summary"] |= metrics.measure(self.metrics, report["samples"], saved.frames, others)
            if self.attributes:
                report |= self.attributes.measure(report["samples"], saved.frames, others)
                report["summary"][attributes.ACCURACY] = attributes.summary(report["samples"])
        return report


def prepared(plan: Plan) -> Judge | None:
    """The judge of a run that asks for the quality of its images; None for another run.

    Raises UserError for a reference that cannot be compared, for a metric that cannot be loaded, and for a broken
    classifier of the model.
    """
    wanted = plan.run.quality
    if about_images(plan.run) is None:
        return None
    named = None if wanted.manifest is None else manifest.read(wanted.manifest)
    loaded, place = metrics.load(wanted.metrics), attributes.folder_in(plan.card)
    known = None if place is None else attributes.load(place)
    folder = plan.reference or wanted.reference
    if folder is None or (folder == AUTO and plan.reference is None):  # a dry run makes no reference
        return Judge(plan, named, None, None, loaded, known)
    samples = [plain(sample) for batch in plan.batches for sample in batch]
    references = quality.counterparts(folder, samples, image_size.expected(plan), named)
    return Judge(plan, named, folder, references, loaded, known)


def judged(judge: Judge, saved: Saved, report: dict[str, Any]) -> RunError | None:
    """Add `quality` to the dump `report`, and log it. Returns the error of a run whose images fail, to be raised when
    the dump is written."""
    blank = _blank(saved.samples, saved.frames)
    try:
        report["quality"] = judge.judge(saved)
        blank = blank or _blank(saved.samples, map(quality.read_reference, judge.references or ()), "the reference of ")
    except (UserError, RunError) as error:
        return blank or RunError(f"The images are saved, but not compared: {error}")
    if judge.references is not None:
        where = (
            judge.plan.run.quality.reference if judge.plan.reference is None else "the reference without approximations"
        )
        log.info(f"Quality against {where}: {quality.sentence(report['quality'])}")
    if judge.attributes is not None:
        log.info(f"Quality, attribute accuracy: {attributes.sentence(report['quality'])}")
    for name in judge.metrics:
        log.info(f"Quality, {name}: {metrics.sentence(report['quality']['summary'][name])}")
    return blank


def _blank(samples: Sequence[dict[str, Any]], frames: Iterable[Any], what: str = "") -> RunError | None:
    """The error of images without content; None if all have some."""
    faults = {
        sample["index"]: fault
        for sample, frame in zip(samples, frames, strict=False)  # no frames without a reference
        if (fault := blank_images.fault(frame))
    }
    if not faults:
        return None
    first, *others = faults
    more = f" (and {len(others)} more: {', '.join(map(str, others))})" if others else ""
    return RunError(f"The images are saved, but {what}sample {first} is {faults[first]}{more}")
