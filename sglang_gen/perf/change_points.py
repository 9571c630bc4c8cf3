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

A few commits do not show their noise. If there are fewer than FEW_COMMITS, and each has ENOUGH_DUMPS, all places are
proposed, and the dumps take the place of the commits in these formulas, as in `sglang perf check`. They show the noise
within a commit, and not what differs from one session to the next, so it must be at most QUIET, or QUIET_ADJUSTED for
times that are adjusted for the speed of the machine. tools/perf_rates.py has the rates.

A machine whose speed drifts makes neighboring commits alike. The correlation of neighbors within segments increases e
(`log_ratio.Noise`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from sglang_gen.perf.busy_machine import QUIET
from sglang_gen.perf.log_ratio import Noise
from sglang_gen.perf.statistics import Verdict, geometric_mean

LEAST_DUMPS = 2  # in a segment; a single dump may be slow for any reason
FEW_COMMITS = 8  # with fewer, their values alone hide many changes
ENOUGH_DUMPS = 10  # of each of few commits
QUIET_ADJUSTED = 0.05  # noise of dumps up to which those of few commits decide, if adjusted for the machine's speed
PENALTY = 2.0  # times the variance and the logarithm of the number of commits


@dataclass(frozen=True)
class Place:
    """A commit of a series: the value of a metric at it, and the number of its dumps.

    `logs` are the logarithms of the values of its dumps, in the order of time.
    """

    value: float
    dumps: int
    logs: Sequence[float] = ()


Logs = Callable[[Sequence[Place]], list[float]]


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
    """What is a change: `tolerance` is the relative tolerance at a base value.

    `is_adjusted` says that the values are those at one speed of the machine.
    """

    tolerance: Callable[[float], float]
    confidence: float = 0.99
    is_adjusted: bool = False


def is_by_dump(places: Sequence[Place], rule: Rule) -> bool:
    """Whether each dump is an observation, since there are few commits."""
    if not 2 <= len(places) < FEW_COMMITS or any(len(place.logs) < ENOUGH_DUMPS for place in places):
        return False
    most = QUIET_ADJUSTED if rule.is_adjusted else QUIET
    return Noise.of([place.logs for place in places]).variance <= most**2


def find(places: Sequence[Place], rule: Rule) -> list[Change]:
    """The change points of a series, in the order of time."""
    by_dump = is_by_dump(places, rule)
    logs = _logs_of_dumps if by_dump else _logs
    bounds = [0, *(range(1, len(places)) if by_dump else _proposed(places)), len(places)]
    while len(bounds) > 2:
        noise = Noise.of([logs(places[start:end]) for start, end in pairwise(bounds)])
        changes = [
            _judged(places, (bounds[at - 1], bounds[at], bounds[at + 1]), noise, rule, logs)
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


def _judged(places: Sequence[Place], bounds: tuple[int, int, int], noise: Noise, rule: Rule, logs: Logs) -> Change:
    start, middle, end = bounds
    base, new, tries = places[start:middle], places[middle:end], len(places) - 1
    found = noise.difference(logs(base), logs(new))
    enough = all(sum(place.dumps for place in side) >= LEAST_DUMPS for side in (base, new))
    p_value = tries * found.p_value(rule.tolerance(geometric_mean([place.value for place in base])))
    verdict = Verdict.REGRESSION if found.shift > 0 else Verdict.IMPROVEMENT
    interval = found.interval(1 - (1 - rule.confidence) / tries) or (0.0, math.inf)
    return Change(middle, math.exp(found.shift), interval, 1 - min(1.0, p_value) if enough else 0.0, verdict)


def _logs_of_dumps(places: Sequence[Place]) -> list[float]:
    return [value for place in places for value in place.logs]


def _logs(places: Sequence[Place]) -> list[float]:
    return [math.log(place.value) for place in places]
