"""Decides whether a new program is slower than its base: ratio of run times, confidence interval, verdict.

Run times vary by factors rather than by amounts, so logarithms are compared. With observations
x_1..x_n of the base, y_1..y_m of the new program, and sample variances u, v of their logarithms:

    log ratio   d = mean(log y) - mean(log x)           the ratio of the geometric means
    its error   e = sqrt(u / n + v / m)
    freedom     k = e^4 / ((u/n)^2 / (n-1) + (v/m)^2 / (m-1))
    interval    exp(d - t e) .. exp(d + t e)            t: quantile of Student's t, k degrees of freedom

(B. L. Welch, "The generalization of 'Student's' problem when several different population variances are involved",
Biometrika 34, 1947; the two variances need not be equal.) If one side has a single observation, the variance of the
other side is used for it: e = s sqrt(1 + 1/n), k = n - 1. Two single observations have no interval: they pass if the
ratio is within the tolerance, which proves little, and are too noisy for any other verdict.

The repeats needed follow C. Stein, "A two-sample test for a linear hypothesis whose power is independent of the
variance", Annals of Mathematical Statistics 16, 1945: the quantiles of the first observations' own degrees of freedom
allow for their variance being an estimate. Per side,

    N = (t_confidence + t_power)^2 (u + v) / log(1 + tolerance)^2

Two single observations do not show their variance; ASSUMED_NOISE is then the standard deviation on both sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean, variance

from sglang_gen.perf.log_ratio import Difference, exp, independent, quantile

POWER = 0.9  # probability that the predicted number of repeats leads to a decision
ASSUMED_NOISE = 0.01  # standard deviation of the logarithms of run times on a quiet machine
MOST_REPEATS = 10_000  # upper limit of the predicted number of repeats


class Verdict(Enum):
    """Verdict on a metric, a recipe, or a whole comparison, in order of increasing severity."""

    PASS = "PASS"
    IMPROVEMENT = "IMPROVEMENT"
    TOO_NOISY = "TOO_NOISY"
    RECIPE_MISMATCH = "RECIPE_MISMATCH"
    REGRESSION = "REGRESSION"


@dataclass(frozen=True)
class Judgement:
    """Ratio new/base and its verdict. `interval` is None if both sides have a single observation."""

    ratio: float
    interval: tuple[float, float] | None
    verdict: Verdict
    repeats_needed: int | None = None  # per side, if the verdict is TOO_NOISY


def judge(
    base: Sequence[float],
    new: Sequence[float],
    tolerance: float,
    confidence: float = 0.95,
    difference: Callable[[Sequence[float], Sequence[float]], Difference] = independent,
) -> Judgement:
    """Judge positive observations of a metric for which larger is worse; `tolerance` is relative (0.02: two percent).

    REGRESSION if the whole interval lies above 1 + tolerance, IMPROVEMENT if it lies below 1 - tolerance, PASS if it
    ends at or below 1 + tolerance, TOO_NOISY otherwise. A program that is slower by the tolerance or less is judged a
    regression with probability (1 - confidence) / 2 at most, whatever the noise. Without an interval the verdict is
    PASS if the ratio is at most 1 + tolerance, else TOO_NOISY. `difference` is `independent`, `drifting` or `paired`.
    """
    found = difference([math.log(value) for value in base], [math.log(value) for value in new])
    logs, ratio = found.log_interval(confidence), exp(found.shift)
    if logs is None:
        if found.shift <= math.log1p(tolerance):
            return Judgement(ratio, None, Verdict.PASS)
        return Judgement(ratio, None, Verdict.TOO_NOISY, _repeats_at_assumed_noise(tolerance, confidence))
    verdict, have = _verdict(*logs, tolerance), min(len(base), len(new))
    needed = _repeats_needed(found, have, tolerance, confidence) if verdict is Verdict.TOO_NOISY else None
    return Judgement(ratio, (exp(logs[0]), exp(logs[1])), verdict, needed)


def by_ratio(ratio: float, tolerance: float) -> Verdict:
    """The verdict of a ratio that is taken as exact; never TOO_NOISY."""
    shift = math.log(ratio)
    return _verdict(shift, shift, tolerance)


def noise(values: Sequence[float]) -> float | None:
    """Standard deviation of the logarithms (0.01 is about one percent); None for a single observation."""
    return math.sqrt(variance(math.log(value) for value in values)) if len(values) > 1 else None


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def _verdict(low: float, high: float, tolerance: float) -> Verdict:
    """`low` and `high` are the ends of the interval of the log ratio."""
    if low > math.log1p(tolerance):
        return Verdict.REGRESSION
    if tolerance < 1 and high < math.log1p(-tolerance):
        return Verdict.IMPROVEMENT
    return Verdict.PASS if high <= math.log1p(tolerance) else Verdict.TOO_NOISY


def _repeats_needed(found: Difference, have: int, tolerance: float, confidence: float) -> int:
    """Repeats per side after which an unchanged program passes, and one slower by twice the tolerance is detected, each
    with probability POWER. If there are that many already, the ratio is close to the tolerance, and the result is the
    number that distinguishes this ratio from the tolerance.
    """
    quantiles = quantile(0.5 + confidence / 2, found.freedom) + quantile(POWER, found.freedom)
    factor, limit = quantiles**2 * found.variance, math.log1p(tolerance)
    for distance in (limit, abs(found.shift - limit)):
        needed = MOST_REPEATS if factor >= MOST_REPEATS * distance**2 else math.ceil(factor / distance**2)
        if needed > have:
            return needed
    return have + 1


def _repeats_at_assumed_noise(tolerance: float, confidence: float) -> int:
    """Repeats per side that decide, as in `_repeats_needed`, if the noise is ASSUMED_NOISE."""
    limit = math.log1p(tolerance)
    repeats = 2
    while repeats < MOST_REPEATS:
        freedom = repeats - 1.0  # the least that Welch's formula gives for so many
        factor = (quantile(0.5 + confidence / 2, freedom) + quantile(POWER, freedom)) ** 2 * 2 * ASSUMED_NOISE**2
        if factor <= repeats * limit**2:
            return repeats
        repeats += 1 + repeats // 10
    return MOST_REPEATS
