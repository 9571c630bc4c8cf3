"""The image quality of two runs over the same samples: paired differences of each measure, with standard errors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sglang_gen import log
from sglang_gen.errors import InvalidValueError
from sglang_gen.perf import agreement, attributes

MOST_OF_A_MEASURE = 1e15


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
    """The measures in the entry `quality` of a dump; empty for a dump without.

    Raises InvalidValueError for a measure that is not a finite number.
    """
    samples = quality.get("samples") or [] if isinstance(quality, Mapping) else []
    found: Measures = {
        (entry.get("index"), entry.get("prompt"), entry.get("seed")): {
            **{name: entry[name] for name in (*agreement.HIGHER_IS_BETTER, attributes.ACCURACY) if name in entry},
            **entry.get("metrics", {}),
        }
        for entry in samples
    }
    for name, value in (pair for measures in found.values() for pair in measures.items()):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and abs(value) < MOST_OF_A_MEASURE):
            raise InvalidValueError(f"the measure {name} of an image is {json.dumps(value)[:40]}, not a number")
    return found


def compare_quality(base: Sequence[Measures], new: Sequence[Measures]) -> tuple[list[QualityRow], list[str]]:
    """The rows of two sides, each given as the measures of its dumps, and notes about images that are left out.

    Repeats of one recipe make the same images, so the first dump with measures stands for its side.
    """
    left, right = (next(filter(None, side), {}) for side in (base, new))
    if not left or not right:
        return [], []
    if left.keys() != right.keys():
        return [], ["the quality is not compared: the two sides have different samples"]
    images = (*left.values(), *right.values())
    names = [name for name in images[0] if all(name in image for image in images)]
    rows, notes = [], []
    for name in names:
        pairs = [(left[key][name], right[key][name]) for key in left]
        finite = [(one, other) for one, other in pairs if one is not None and other is not None]
        if len(finite) < len(pairs):
            without = f"no {name} for {len(pairs) - len(finite)} of {log.quantity(len(pairs), 'image')}"
            notes.append(f"{without}: {_reason(name, pairs)}")
        if finite:
            rows.append(_row(name, finite))
    return rows, notes


def _reason(name: str, pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Why a measure is absent on a side."""
    if name == attributes.ACCURACY:
        return "their prompts name none"
    counts = {side: sum(pair[at] is None for pair in pairs) for at, side in enumerate(("base", "new"))}
    sides = " and ".join(f"{count} of {side}" for side, count in counts.items() if count)
    return f"identical to their reference are {sides}"


def _row(name: str, pairs: Sequence[tuple[float, float]]) -> QualityRow:
    base, new = zip(*pairs, strict=True)
    paired = agreement.paired_difference(new, base)
    left, right, difference = (round(fmean(values), 6) for values in (base, new, (b - a for a, b in pairs)))
    return QualityRow(name, len(pairs), left, right, difference, paired["standard_error"])
