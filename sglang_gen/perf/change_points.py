"""Finds the commits at which a metric changed: ruptures proposes change points, intervals decide which are real.

The logarithms of one value per commit are cut into segments of constant mean by PELT (R. Killick, P. Fearnhead and
I. A. Eckley, "Optimal detection of changepoints with a linear computational cost", JASA 107, 2012), with the package
ruptures and a penalty so low that it proposes too many. Each proposed change point is then judged by the interval of
the ratio of its two segments. The one with the largest p value is removed and its segments are joined, until every p
value is small enough. With n commits in k segments, of which two with n1 and n2 commits meet at the change point,

    log ratio   d = mean of the second - mean of the first
    variance    s^2 = sum of the squared distances of all commits from the mean of their segment / (n - k)
    its error   e = s sqrt(1 / n1 + 1 / n2)
    p value     p = 2 (n - 1) P(T > (|d| - log(1 + tolerance)) / e)

T is Student's t variable with n - k degrees of freedom, and n - 1 the number of places where the history can change
(Bonferroni). The noise is that of the machine, so one variance serves all segments, and a short one can be judged. The
confidence is 1 - p.

Few commits do not show their noise: two never show a change, and fewer than FEW_COMMITS hide many. Their dumps cannot
take their place, because they do not show what differs from one session of measurements to the next.

A machine whose speed drifts makes neighboring commits alike. The correlation of neighbors within segments increases e
(`log_ratio.Noise`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from sglang_gen.perf.log_ratio import Noise
from sglang_gen.perf.statistics import Verdict, geometric_mean

FEW_COMMITS = 8  # with fewer, a change of 10 % may not be found at any noise of a machine
LEAST_DUMPS = 2  # in a segment; a single dump may be slow for any reason
PENALTY = 2.0  # times the variance and the logarithm of the number of commits


@dataclass(frozen=True)
class Place:
    """A commit of a series: the value of a metric at it, and the number of its dumps."""

    value: float
    dumps: int


@dataclass(frozen=True)
class Change:
    """A change point. `index` is the first commit of the new level; `interval` is that of `ratio` at the confidence
    that was asked for, which allows for the number of commits. `confidence` is the highest that would confirm it.
    """

    index: int
    ratio: float
    interval: tuple[float, float]
    confidence: float
    verdict: Verdict


@dataclass(frozen=True)
class Rule:
    """What is a change: `tolerance` is the relative tolerance at a base value."""

    tolerance: Callable[[float], float]
    confidence: float = 0.99


def find(places: Sequence[Place], rule: Rule) -> list[Change]:
    """The change points of a series, in the order of time."""
    bounds = [0, *_proposed(places), len(places)]
    while len(bounds) > 2:
        noise = Noise.of([_logs(places[start:end]) for start, end in pairwise(bounds)])
        changes = [
            _judged(places, (bounds[at - 1], bounds[at], bounds[at + 1]), noise, rule)
            for at in range(1, len(bounds) - 1)
        ]
        weakest = min(range(len(changes)), key=lambda at: changes[at].confidence)
        if changes[weakest].confidence >= rule.confidence:
            return changes
        del bounds[1 + weakest]
    return []


def _proposed(places: Sequence[Place]) -> list[int]:
    if len(places) < 2:
        return []
    import numpy as np
    import ruptures

    logs = _logs(places)
    steps = [abs(after - before) for before, after in pairwise(logs)]
    spread = median(steps) / (0.6745 * math.sqrt(2)) or max(steps) / 1000  # robust: few of the steps are changes
    if not spread:
        return []
    algorithm = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(np.asarray(logs).reshape(-1, 1))
    found: list[int] = algorithm.predict(pen=PENALTY * spread**2 * math.log(len(logs)))
    return found[:-1]


def _judged(places: Sequence[Place], bounds: tuple[int, int, int], noise: Noise, rule: Rule) -> Change:
    start, middle, end = bounds
    base, new, tries = places[start:middle], places[middle:end], len(places) - 1
    found = noise.difference(_logs(base), _logs(new))
    enough = all(sum(place.dumps for place in side) >= LEAST_DUMPS for side in (base, new))
    p_value = tries * found.p_value(rule.tolerance(geometric_mean([place.value for place in base])))
    verdict = Verdict.REGRESSION if found.shift > 0 else Verdict.IMPROVEMENT
    interval = found.interval(1 - (1 - rule.confidence) / tries) or (0.0, math.inf)
    return Change(middle, math.exp(found.shift), interval, 1 - min(1.0, p_value) if enough else 0.0, verdict)


def _logs(places: Sequence[Place]) -> list[float]:
    return [math.log(place.value) for place in places]
