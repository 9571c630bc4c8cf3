"""Interactions of a sweep: pairs of settings whose images are further from the reference than both alone explain.

The first cell is the base. A cell that differs from it in two keys is compared with the two cells that differ in one of
them. Errors that do not depend on each other add up as mean squared errors, so the excess of an image is

    x = e(both) - e(one) - e(other) + e(base)

A pair is named if the mean of x is more than two standard errors above 0 (with several images), and more than a tenth
of the sum of the two.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from sglang_gen.perf.quality import decibels
from sglang_gen.report.cell_metrics import Metrics

LEAST_EXCESS = 0.05  # mean squared error in levels; images that are equal within rounding have 0.01 or less
LEAST_SHARE = 0.1  # of the sum of both errors


@dataclass(frozen=True)
class Interaction:
    """Two settings, the mean squared error of a cell that has both, and the sum of those that have one each."""

    settings: tuple[str, str]
    error: float
    summed: float
    images: int


def interactions(found: Sequence[Metrics]) -> list[Interaction]:
    """The pairs of the sweep, the largest excess first."""
    rated = [one for one in found if one.errors]
    if not rated:
        return []
    base, cells = rated[0], {tuple(one.cell.values.items()): one for one in rated}
    pairs = []
    for one in rated:
        changed = [key for key, value in one.cell.values.items() if value != base.cell.values.get(key)]
        singles = [cells.get(_with(base.cell.values, {key: one.cell.values[key]})) for key in changed]
        if len(changed) == 2 and None not in singles:
            known = [single.errors for single in singles if single is not None]
            names = tuple(f"{key}={one.cell.values[key]}" for key in changed)
            pairs.append(_judged((names[0], names[1]), one.errors, known, base.errors))
    return sorted(filter(None, pairs), key=lambda pair: pair.summed - pair.error)


def _with(values: Mapping[str, str], changed: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple({**values, **changed}.items())


def _judged(
    settings: tuple[str, str], both: Sequence[float], singles: Sequence[Sequence[float]], base: Sequence[float]
) -> Interaction | None:
    """The interaction of a pair; None if it is none, or if the cells have different numbers of images."""
    if len({len(both), len(base), *map(len, singles)}) > 1:
        return None
    summed = [one + other - own for one, other, own in zip(*singles, base, strict=True)]
    excess = [error - sum_ for error, sum_ in zip(both, summed, strict=True)]
    mean, error = fmean(excess), stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    if mean <= max(LEAST_EXCESS, LEAST_SHARE * fmean(summed), 2 * error):
        return None
    return Interaction(settings, fmean(both), max(fmean(summed), 0.0), len(both))


def sentences(pairs: Sequence[Interaction], most: int = 3) -> list[str]:
    """What the report says about the pairs."""
    named = [
        f"{' with '.join(pair.settings)} has {decibels(pair.error):.1f} dB, where the errors of each alone add up to "
        f"{'none' if not pair.summed else f'{decibels(pair.summed):.1f} dB'}"
        + (" (one image)" if pair.images == 1 else "")
        for pair in pairs[:most]
    ]
    others = len(pairs) - most
    more = f" So {'is 1 more pair' if others == 1 else f'are {others} more pairs'}." if others > 0 else ""
    return [f"Together worse than their sum: {'; '.join(named)}.{more}"] if named else []
