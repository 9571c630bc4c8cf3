"""Successive halving: many candidates on few images, then the faster half of them on twice as many.

K. Jamieson and A. Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
Knows neither how a candidate is measured nor what makes one better than another.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Entry = TypeVar("Entry")


def image_counts(images: int, first: int) -> list[int]:
    """How many images each rung generates: `first`, twice as many, and so on up to all of them.

    >>> image_counts(16, 2)
    [2, 4, 8, 16]
    """
    counts = [min(first, images)]
    while counts[-1] < images:
        following = 2 * counts[-1]
        counts.append(following if 2 * following <= 2 * images - following else images)
    return counts


def entrants(seconds: float, costs: Sequence[float], most: int) -> int:
    """How many candidates can start if all rungs together may take `seconds`; `costs` are those of one candidate.

    Each rung has half of the candidates of the one before it.
    """
    each = sum(cost / 2**rung for rung, cost in enumerate(costs))
    return most if each <= 0 else max(0, min(most, math.floor(seconds / each)))


def halve(
    field: Sequence[Entry],
    rungs: Sequence[int],
    measure: Callable[[Sequence[Entry], int], bool],
    ranked: Callable[[Sequence[Entry]], list[Entry]],
    least: int,
) -> list[Entry]:
    """The survivors of all rungs, best first.

    `measure(entries, rung)` measures the entries and returns False when no time is left, which ends the halving;
    `ranked` returns the entries that are still allowed, best first. At least `least` of those survive each rung.
    """
    remaining = list(field)
    for rung in rungs:
        goes_on = measure(remaining, rung)
        remaining = ranked(remaining)
        if not goes_on:
            break
        remaining = remaining[: max(least, math.ceil(len(remaining) / 2))]
    return remaining
