"""The noise of measurements in rounds: candidates that ran one after the other have the drift of the machine in common.

The logarithm of a time is that of its candidate plus that of its round plus noise of one variance for all, as in a
randomized block design (R. A. Fisher, "The Design of Experiments", 1935). All rounds together show the variance, so
that two or three observations of a candidate suffice for an interval.
"""

from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import Any

STEPS = 200  # of alternating means; they end earlier if nothing changes
SETTLED = 1e-9


def residual_variance(rounds: Sequence[Mapping[Any, float]]) -> tuple[float, int]:
    """Variance of the noise of one logarithm, and its degrees of freedom; `rounds` hold logarithms by candidate.

    The effects of candidates and rounds are fitted by least squares, by taking means in turn. N logarithms of C
    candidates in R rounds leave N - C - R + 1 degrees of freedom, as many more as there are groups of rounds that have
    no candidate in common.
    """
    used = [each for each in rounds if len(each) > 1]
    places = [(number, name, value) for number, each in enumerate(used) for name, value in each.items()]
    of_round: dict[Hashable, float] = dict.fromkeys(range(len(used)), 0.0)
    of_name: dict[Hashable, float] = dict.fromkeys((name for _, name, _ in places), 0.0)
    freedom = len(places) - len(of_round) - len(of_name) + _groups(used)
    if freedom < 1:
        return 0.0, 0
    for _ in range(STEPS):
        moved = _take_means(of_round, [(number, value - of_name[name]) for number, name, value in places])
        moved = max(moved, _take_means(of_name, [(name, value - of_round[number]) for number, name, value in places]))
        if moved < SETTLED:
            break
    squares = sum((value - of_round[number] - of_name[name]) ** 2 for number, name, value in places)
    return squares / freedom, freedom


def _take_means(effects: dict[Hashable, float], values: Sequence[tuple[Hashable, float]]) -> float:
    """Set each effect to the mean of its values. Returns by how much the effects have moved."""
    own: dict[Hashable, list[float]] = {}
    for name, value in values:
        own.setdefault(name, []).append(value)
    means = {name: fmean(found) for name, found in own.items()}
    moved = max(abs(means[name] - effects[name]) for name in means)
    effects.update(means)
    return moved


def _groups(rounds: Sequence[Mapping[Any, float]]) -> int:
    """The number of groups of rounds that have no candidate in common."""
    groups: list[set[Hashable]] = []
    for each in rounds:
        joined = set(each)
        apart = [group for group in groups if not group & joined]
        for group in groups:
            if group & set(each):
                joined |= group
        groups = [*apart, joined]
    return len(groups)
