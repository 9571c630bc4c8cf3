"""Compares perf dumps of two sides: pairs them by recipe (what was run) and judges each metric."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError
from sglang_gen.perf.dump_reader import Dump
from sglang_gen.perf.statistics import Verdict, geometric_mean, judge, noise

RESOLUTION = {"ms": 0.001, "MB": 0.01}  # rounding of the values in a dump; zeros are replaced by it


@dataclass(frozen=True)
class Tolerance:
    """Allowed change of a metric, the larger of both: `relative` to the base, and `absolute` in ms or MB."""

    relative: float
    absolute: float = 0.0


# The first part of a metric's name -> its unit and default tolerance.
KINDS = {
    "total": ("ms", Tolerance(0.02)),
    "stage": ("ms", Tolerance(0.10, 120.0)),
    "step": ("ms", Tolerance(0.02)),
    "memory": ("MB", Tolerance(0.02)),
}
TOLERANCES = {kind: tolerance for kind, (_, tolerance) in KINDS.items()}


@dataclass(frozen=True)
class Values:
    """The observations of one side; `noise` is the standard deviation of their logarithms."""

    observations: list[float]
    geometric_mean: float
    noise: float | None

    @classmethod
    def of(cls, observations: list[float]) -> "Values":
        return cls(observations, geometric_mean(observations), noise(observations))


@dataclass(frozen=True)
class Row:
    """One metric of a comparison. `tolerance` is the relative tolerance that was applied, computed from both parts."""

    metric: str
    unit: str
    base: Values
    new: Values
    ratio: float
    interval: tuple[float, float] | None
    tolerance: float
    verdict: Verdict
    repeats_needed: int | None


@dataclass(frozen=True)
class Comparison:
    """One recipe on both sides; for a RECIPE_MISMATCH `differences` lists those to the nearest recipe of the base."""

    model: Any
    prompt: Any
    fingerprint: str | None
    base_files: list[Path]
    new_files: list[Path]
    verdict: Verdict
    rows: list[Row] = field(default_factory=list)
    images_per_second: dict[str, float | None] = field(default_factory=dict)
    only_in: dict[str, list[str]] = field(default_factory=dict)  # base, new: metrics that the other side lacks
    differences: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All comparisons, and the most severe of their verdicts."""

    verdict: Verdict
    confidence: float
    tolerances: dict[str, Tolerance]
    comparisons: list[Comparison]
    base_without_new: list[Path]  # dumps of recipes that the new side lacks; they do not affect the verdict


def compare(
    base: Sequence[Dump], new: Sequence[Dump], tolerances: Mapping[str, Tolerance], confidence: float = 0.95
) -> Report:
    """Judge every recipe of `new` against the same recipe of `base`. Both hold at least one dump."""
    bases, comparisons, used = _by_recipe(base), [], set()
    for dumps in _by_recipe(new).values():
        partner = _partner(bases.values(), dumps[0])
        comparison = _unjudged(partner, dumps)
        if not comparison.differences:
            used.add(partner[0].recipe)
            comparison = _judge(comparison, partner, dumps, tolerances, confidence)
        comparisons.append(comparison)
    left = [dump.path for recipe, dumps in bases.items() if recipe not in used for dump in dumps]
    return Report(_worst(item.verdict for item in comparisons), confidence, dict(tolerances), comparisons, left)


def _by_recipe(dumps: Sequence[Dump]) -> dict[str, list[Dump]]:
    recipes: dict[str, list[Dump]] = {}
    for dump in dumps:
        recipes.setdefault(dump.recipe, []).append(dump)
    return recipes


def _partner(bases: Iterable[Sequence[Dump]], new: Dump) -> Sequence[Dump]:
    """The recipe of the base that differs least. Raises UserError if several do not differ at all."""
    distances = [(len(differences(dumps[0], new)), dumps) for dumps in bases]
    equal = [dumps[0].path for distance, dumps in distances if distance == 0]
    if len(equal) > 1:
        names = ", ".join(map(str, equal))
        raise UserError(
            f"{new.path} fits several recipes of the base, since a fingerprint is missing; name one: {names}"
        )
    return min(distances, key=lambda pair: pair[0])[1]


def differences(base: Dump, new: Dump) -> list[dict[str, Any]]:
    """`{field, base, new}` for each field that differs, in the fingerprint or (if a side has none) in `meta`."""
    if base.fingerprint is None or new.fingerprint is None:
        left, right = base.meta, new.meta
    elif base.fingerprint == new.fingerprint:
        return []
    else:
        left, right = _flat(base.fields), _flat(new.fields)
    names = [
        name for name in {**left, **right} if left.get(name) != right.get(name) or (name in left) != (name in right)
    ]
    if not names and left is not base.meta:
        return [{"field": "hash", "base": base.fingerprint, "new": new.fingerprint}]
    return [{"field": name, "base": left.get(name), "new": right.get(name)} for name in names]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _unjudged(base: Sequence[Dump], new: Sequence[Dump]) -> Comparison:
    notes = []
    if base[0].fingerprint is None or new[0].fingerprint is None:
        notes.append("no fingerprint: model, prompt and number of denoising steps were compared, nothing else")
    return Comparison(
        **{name: new[0].meta[name] for name in ("model", "prompt")},
        fingerprint=new[0].fingerprint,
        base_files=[dump.path for dump in base],
        new_files=[dump.path for dump in new],
        verdict=Verdict.RECIPE_MISMATCH,
        differences=differences(base[0], new[0]),
        notes=notes,
    )


def _judge(
    comparison: Comparison,
    base: Sequence[Dump],
    new: Sequence[Dump],
    tolerances: Mapping[str, Tolerance],
    confidence: float,
) -> Comparison:
    left, right = _merge(base), _merge(new)
    rows = [_row(name, left[name], right[name], tolerances, confidence) for name in left if name in right]
    notes = list(comparison.notes)
    if any(row.interval is None for row in rows):
        notes.append("metrics with one observation on each side have no interval and were judged by the tolerance only")
    return replace(
        comparison,
        verdict=_worst(row.verdict for row in rows),
        rows=rows,
        images_per_second={"base": _rate(base), "new": _rate(new)},
        only_in={
            "base": [name for name in left if name not in right],
            "new": [name for name in right if name not in left],
        },
        notes=notes,
    )


def _merge(dumps: Sequence[Dump]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for dump in dumps for name in dump.metrics)
    merged = {name: [value for dump in dumps for value in dump.metrics.get(name, ())] for name in names}
    return {name: merged[name] for name in sorted(merged, key=lambda name: list(KINDS).index(name.partition(".")[0]))}


def _row(name: str, base: list[float], new: list[float], tolerances: Mapping[str, Tolerance], confidence: float) -> Row:
    kind = name.partition(".")[0]
    unit = KINDS[kind][0]
    left, right = (Values.of([max(value, RESOLUTION[unit]) for value in side]) for side in (base, new))
    allowed = max(tolerances[kind].relative, tolerances[kind].absolute / left.geometric_mean)
    judged = judge(left.observations, right.observations, allowed, confidence)
    return Row(name, unit, left, right, judged.ratio, judged.interval, allowed, judged.verdict, judged.repeats_needed)


def _rate(dumps: Sequence[Dump]) -> float | None:
    """Images per second; not judged, since it is derived from the total time."""
    if dumps[0].images is None:
        return None
    return dumps[0].images * 1000 / geometric_mean(_merge(dumps)["total"])


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=list(Verdict).index)
