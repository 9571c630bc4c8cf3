"""The image quality of two runs over the same samples: paired differences of each measure, with standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sglang_gen.perf import agreement, attributes


@dataclass(frozen=True)
class QualityRow:
    """One measure of both sides: means over the same `images`, and the mean of new - base with its standard error."""

    measure: str
    images: int
    base: float
    new: float
    difference: float
    standard_error: float | None


Measures = Mapping[tuple[Any, ...], Mapping[str, float | None]]  # of each image, by its index, prompt and seed


def by_sample(quality: Any) -> Measures:
    """The measures in the entry `quality` of a dump; empty for a dump without."""
    samples = quality.get("samples") or [] if isinstance(quality, Mapping) else []
    return {
        (entry.get("index"), entry.get("prompt"), entry.get("seed")): {
            **{name: entry[name] for name in (*agreement.HIGHER_IS_BETTER, attributes.ACCURACY) if name in entry},
            **entry.get("metrics", {}),
        }
        for entry in samples
    }


def compare_quality(base: Sequence[Measures], new: Sequence[Measures]) -> tuple[list[QualityRow], list[str]]:
    """The rows of two sides, each given as the measures of its dumps, and notes about images that are left out.

    Repeats of one recipe make the same images, so the first dump with measures stands for its side.
    """
    left, right = (next(filter(None, side), {}) for side in (base, new))
    if not left or not right:
        return [], []
    if left.keys() != right.keys():
        return [], ["the quality is not compared: the two sides have different samples"]
    names = [name for name in next(iter(left.values())) if all(name in entry for entry in right.values())]
    rows, notes = [], []
    for name in names:
        pairs = [(left[key][name], right[key][name]) for key in left]
        finite = [(one, other) for one, other in pairs if one is not None and other is not None]
        if len(finite) < len(pairs):
            reason = "their prompts name none" if name == attributes.ACCURACY else "they are identical"
            notes.append(f"{len(pairs) - len(finite)} of {len(pairs)} images have no {name}: {reason}")
        if finite:
            rows.append(_row(name, finite))
    return rows, notes


def _row(name: str, pairs: Sequence[tuple[float, float]]) -> QualityRow:
    base, new = zip(*pairs, strict=True)
    paired = agreement.paired_difference(new, base)
    left, right, difference = (round(fmean(values), 6) for values in (base, new, (b - a for a, b in pairs)))
    return QualityRow(name, len(pairs), left, right, difference, paired["standard_error"])
