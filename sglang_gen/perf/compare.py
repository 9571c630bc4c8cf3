"""Compares perf dumps of two sides: pairs them by recipe (what was run) and judges each metric."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError
from sglang_gen.perf import busy_machine
from sglang_gen.perf.dump_reader import Dump
from sglang_gen.perf.log_ratio import Method
from sglang_gen.perf.paired_quality import QualityRow, compare_quality
from sglang_gen.perf.recipe import allowed, differences
from sglang_gen.perf.statistics import ASSUMED_NOISE, Verdict, by_ratio, geometric_mean, judge, noise

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
    "cpu": ("ms", Tolerance(0.02)),
}
JUDGED = ("total", "stage", "step", "memory")  # unless others are named
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
    across: list[dict[str, Any]] = field(default_factory=list)  # differences that --across allows
    notes: list[str] = field(default_factory=list)
    quality: list[QualityRow] = field(default_factory=list)  # not judged


@dataclass(frozen=True)
class Report:
    """All comparisons, and the most severe of their verdicts."""

    verdict: Verdict
    confidence: float
    tolerances: dict[str, Tolerance]
    comparisons: list[Comparison]
    base_without_new: list[Path]  # dumps of recipes that the new side lacks; they do not affect the verdict
    across: list[str] = field(default_factory=list)  # keys in which the sides may differ
    single: bool = False


@dataclass(frozen=True)
class Rules:
    """How recipes are paired and judged: `across` has the fields in which a pair may differ, by the key that was given.

    With `single` the ratio alone is compared with the tolerance. Metrics beside `metrics` are left out. Each dump is
    one observation if a side has several dumps, which show how much processes differ, and always with another method.
    Wall clocks with more noise than `quiet` are not judged if there are processor times.
    """

    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: TOLERANCES)
    confidence: float = 0.95
    across: Mapping[str, Sequence[str]] = field(default_factory=dict)
    single: bool = False
    metrics: Sequence[str] = JUDGED  # names of metrics, or their first parts, such as stage
    method: Method = Method.INDEPENDENT
    quiet: float | None = None

    def judges(self, name: str) -> bool:
        return name in self.metrics or name.partition(".")[0] in self.metrics


def compare(base: Sequence[Dump], new: Sequence[Dump], rules: Rules) -> Report:
    """Judge every recipe of `new` against the same recipe of `base`. Both hold at least one dump.

    With `rules.across` against the recipe of `base` that differs in these fields only.
    """
    bases = _by_recipe(base)
    pairs = [(_partner(bases, dumps[0], rules), dumps) for dumps in _by_recipe(new).values()]
    return _report(pairs, bases, rules)


def compare_within(dumps: Sequence[Dump], rules: Rules) -> Report:
    """Judge the recipes of `dumps`, each against the first of those that differ from it in `rules.across` only.

    If there are no such recipes, all are compared with the first one, which they do not match. Raises UserError for a
    single recipe.
    """
    recipes = list(_by_recipe(dumps).values())
    if len(recipes) == 1:
        raise UserError(
            f"The dumps are repeats of one recipe, none differs in {', '.join(rules.across)}: {recipes[0][0].path}"
        )
    families: list[list[Sequence[Dump]]] = []
    for recipe in recipes:
        family = next((family for family in families if not _foreign(family[0][0], recipe[0], rules)), None)
        if family is None:
            families.append(family := [])
        family.append(recipe)
    pairs = [(family[0], recipe) for family in families for recipe in family[1:]]
    bases = {family[0][0].recipe: family[0] for family in families}
    if not pairs:
        pairs, bases = [(recipes[0], recipe) for recipe in recipes[1:]], {}
    return _report(pairs, bases, rules)


def _report(
    pairs: Iterable[tuple[Sequence[Dump], Sequence[Dump]]], bases: Mapping[str, Sequence[Dump]], rules: Rules
) -> Report:
    comparisons, used = [], set()
    for partner, dumps in pairs:
        comparison = _unjudged(partner, dumps, rules)
        if not comparison.differences:
            used.add(partner[0].recipe)
            comparison = _judge(comparison, partner, dumps, rules)
        comparisons.append(comparison)
    left = [dump.path for recipe, dumps in bases.items() if recipe not in used for dump in dumps]
    return Report(
        verdict=worst(item.verdict for item in comparisons),
        confidence=rules.confidence,
        tolerances=dict(rules.tolerances),
        comparisons=comparisons,
        base_without_new=left,
        across=list(rules.across),
        single=rules.single,
    )


def _by_recipe(dumps: Sequence[Dump]) -> dict[str, list[Dump]]:
    recipes: dict[str, list[Dump]] = {}
    for dump in dumps:
        recipes.setdefault(dump.recipe, []).append(dump)
    return recipes


def _partner(bases: Mapping[str, Sequence[Dump]], new: Dump, rules: Rules) -> Sequence[Dump]:
    """The same recipe of the base, or the one that differs least. Raises UserError if several fit."""
    if new.recipe in bases:
        return bases[new.recipe]
    distances = [(len(_foreign(dumps[0], new, rules)), dumps) for dumps in bases.values()]
    fitting = [dumps[0].path for distance, dumps in distances if distance == 0]
    if len(fitting) > 1:
        why = f"they differ in {', '.join(rules.across)}" if rules.across else "a fingerprint is missing"
        names = ", ".join(map(str, fitting))
        raise UserError(f"{new.path} fits several recipes of the base, since {why}; name one: {names}")
    return min(distances, key=lambda pair: pair[0])[1]


def _foreign(base: Dump, new: Dump, rules: Rules) -> list[dict[str, Any]]:
    """Differences in fields in which a pair may not differ."""
    return [item for item in differences(base, new) if not allowed(item, rules.across)]


def _unjudged(base: Sequence[Dump], new: Sequence[Dump], rules: Rules) -> Comparison:
    notes, across = [], [item for item in differences(base[0], new[0]) if allowed(item, rules.across)]
    for key, fields in rules.across.items():
        if not any(allowed(item, {key: fields}) for item in across):
            notes.append(f"{key} is the same on both sides")
    if any(item["field"].startswith("cache") for item in across):
        notes.append("step is the median denoising step, which a cache may reuse; stage.denoising has all steps")
    if base[0].fingerprint is None or new[0].fingerprint is None:
        notes.append("no fingerprint: model, prompt and number of denoising steps were compared, nothing else")
    return Comparison(
        **{name: new[0].meta[name] for name in ("model", "prompt")},
        fingerprint=new[0].fingerprint,
        base_files=list(dict.fromkeys(dump.path for dump in base)),
        new_files=list(dict.fromkeys(dump.path for dump in new)),
        verdict=Verdict.RECIPE_MISMATCH,
        differences=_foreign(base[0], new[0], rules),
        across=across,
        notes=notes,
    )


def _judge(comparison: Comparison, base: Sequence[Dump], new: Sequence[Dump], rules: Rules) -> Comparison:
    by_dump = rules.method is not Method.INDEPENDENT or max(len(base), len(new)) > 1
    if by_dump:
        base, new = (sorted(side, key=lambda dump: dump.origin.date or "") for side in (base, new))
    _check_runs(base, new)
    if rules.method is Method.PAIRED:
        check_turns(base, new)
    left, right = (observations(side, rules, by_dump) for side in (base, new))
    if rules.method is Method.PAIRED:  # a metric that a dump lacks has no pairs
        left, right = (
            {name: values for name, values in side.items() if len(values) == len(base)} for side in (left, right)
        )
    speeds = busy_machine.speeds(base, new, rules.method)
    rows = [_row(name, left[name], right[name], rules, speeds) for name in left if name in right]
    rows, unjudged = busy_machine.judged(rows, rules.quiet)
    if not rows:
        raise UserError(f"{new[0].path} and {base[0].path} have no common metric of {', '.join(rules.metrics)}")
    quality, left_out = compare_quality([dump.quality for dump in base], [dump.quality for dump in new])
    notes = [
        *comparison.notes,
        *unjudged,
        *left_out,
        *busy_machine.about_speeds(rows, speeds, [*base, *new], rules.method),
    ]
    if by_dump and any(len(values) > 1 for dump in (*base, *new) for values in dump.metrics.values()):
        notes.append("each dump is one observation, the geometric mean of its repeats, since processes differ")
    if rules.single:
        notes.append("--single: the ratios alone were compared with the tolerances; noise was not considered")
    elif any(row.interval is None for row in rows):
        notes.append(
            "a metric with one observation on each side has no interval: it passes within its tolerance, and beyond it "
            f"it is too noisy (repeats needed at {100 * ASSUMED_NOISE:g}% noise); --single compares the ratios alone"
        )
    return replace(
        comparison,
        verdict=worst(row.verdict for row in rows),
        rows=rows,
        quality=quality,
        images_per_second={"base": _rate(base), "new": _rate(new)},
        only_in={
            "base": [name for name in left if name not in right],
            "new": [name for name in right if name not in left],
        },
        notes=notes,
    )


def observations(dumps: Sequence[Dump], rules: Rules, by_dump: bool) -> dict[str, list[float]]:
    """The observations of each metric that is judged: one per dump, or one per repeat of each dump."""
    names = dict.fromkeys(name for dump in dumps for name in dump.metrics if rules.judges(name))
    found: dict[str, list[float]] = {}
    for name in sorted(names, key=lambda name: list(KINDS).index(name.partition(".")[0])):
        each = [dump.metrics[name] for dump in dumps if name in dump.metrics]
        found[name] = [location(name, one) for one in each] if by_dump else [value for one in each for value in one]
    return found


def _check_runs(base: Sequence[Dump], new: Sequence[Dump]) -> None:
    """Raises UserError if a run is on both sides: it proves nothing, and makes the sides alike."""
    runs = {key: dump for dump in base for key in _keys_of(dump)}
    for dump in new:
        if other := next((runs[key] for key in _keys_of(dump) if key in runs), None):
            what = dump.path if dump.path == other.path else f"{dump.path}, the same run as {other.path},"
            raise UserError(f"{what} is on both sides, and cannot be compared with itself; leave it out of one side")


def _keys_of(dump: Dump) -> Iterator[object]:
    """What tells that two dumps are one run: the file, or a copy of it."""
    yield dump.path.resolve()
    if dump.origin.date is not None:
        yield dump.origin.identity


def check_turns(base: Sequence[Dump], new: Sequence[Dump]) -> None:
    """Raises UserError unless the dumps, in the order of time, are pairs of one of each side."""
    if len(base) != len(new) or len(base) < 2:
        raise UserError(
            f"--paired: BASE and NEW have {len(base)} and {len(new)} dumps of a recipe; run both in turn, equally "
            "often and at least twice"
        )
    both = {dump.origin.date for dump in base} & {dump.origin.date for dump in new} - {None}
    if both:
        raise UserError(f"--paired: BASE and NEW both have a dump of {min(map(str, both))}, so they are the same runs")
    sides = sorted([(dump.origin.date or "", side) for side, dumps in enumerate((base, new)) for dump in dumps])
    for (date, first), (_, second) in zip(sides[::2], sides[1::2], strict=True):
        if first == second or not date:
            raise UserError(
                f"--paired: the dumps of BASE and NEW were not made in turn at {date or 'an unknown time'}; leave out "
                "--paired, or run the programs in turn"
            )


def unit_of(name: str) -> str:
    return KINDS[name.partition(".")[0]][0]


def location(name: str, values: Sequence[float]) -> float:
    """The one observation of a dump whose repeats have these values of a metric."""
    return geometric_mean([max(value, RESOLUTION[unit_of(name)]) for value in values])


def tolerance_of(name: str, base: float, rules: Rules) -> float:
    """The relative tolerance of a metric whose base is `base`, from both parts of its tolerance."""
    limits = rules.tolerances[name.partition(".")[0]]
    return max(limits.relative, limits.absolute / base)


def _row(
    name: str, base: list[float], new: list[float], rules: Rules, speeds: busy_machine.Speeds | None = None
) -> Row:
    unit = unit_of(name)
    left, right = (Values.of([max(value, RESOLUTION[unit]) for value in side]) for side in (base, new))
    tolerance = tolerance_of(name, left.geometric_mean, rules)
    if rules.single:
        ratio = right.geometric_mean / left.geometric_mean
        return Row(name, unit, left, right, ratio, None, tolerance, by_ratio(ratio, tolerance), None)
    difference = busy_machine.difference(name, rules.method, speeds)
    judged = judge(left.observations, right.observations, tolerance, rules.confidence, difference)
    return Row(name, unit, left, right, judged.ratio, judged.interval, tolerance, judged.verdict, judged.repeats_needed)


def _rate(dumps: Sequence[Dump]) -> float | None:
    """Images per second; not judged, since it is derived from the total time."""
    if dumps[0].images is None:
        return None
    return dumps[0].images * 1000 / location("total", [value for dump in dumps for value in dump.metrics["total"]])


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=list(Verdict).index)
