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
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from statistics import NormalDist, fmean, variance

POWER = 0.9  # probability that the predicted number of repeats leads to a decision
ASSUMED_NOISE = 0.01  # standard deviation of the logarithms of run times on a quiet machine
MOST_REPEATS = 10_000  # upper limit of the predicted number of repeats
LEAST_FREEDOM = 4.0  # of correlated observations
_EXPONENT = 50.0  # log ratios are clamped to this, so that exp does not overflow


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


@dataclass(frozen=True)
class Difference:
    """The log ratio of two sides, its standard error (None for two single observations) and degrees of freedom."""

    shift: float
    error: float | None
    freedom: float

    @classmethod
    def of(cls, base: Sequence[float], new: Sequence[float]) -> "Difference":
        logs = [math.log(value) for value in base], [math.log(value) for value in new]
        return cls(fmean(logs[1]) - fmean(logs[0]), *_error(*logs))

    def correlated(self, correlation: float) -> "Difference":
        """The same for observations in the order of time of which each is correlated with the next.

        A first-order autoregressive process of n values has the information of n (1 - r) / (1 + r) independent ones,
        which applies to the freedom too, down to LEAST_FREEDOM: the formula is for long series.
        """
        if self.error is None or correlation <= 0:
            return self
        factor = (1 + correlation) / (1 - correlation)
        freedom = max(self.freedom / factor, min(self.freedom, LEAST_FREEDOM))
        return Difference(self.shift, self.error * math.sqrt(factor), freedom)

    def p_value(self, tolerance: float) -> float:
        """Of the hypothesis that the ratio is within the tolerance, two-sided; 1 if it is, or without an error."""
        limit = math.log1p(tolerance) if self.shift > 0 else -math.log1p(-tolerance) if tolerance < 1 else math.inf
        beyond = abs(self.shift) - limit
        if self.error is None or beyond <= 0:
            return 1.0
        return 2 * (1 - student(beyond / self.error, self.freedom)) if self.error else 0.0

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """The interval of the ratio."""
        if self.error is None:
            return None
        half = quantile(0.5 + confidence / 2, self.freedom) * self.error if self.error else 0.0
        return _exp(self.shift - half), _exp(self.shift + half)


def judge(base: Sequence[float], new: Sequence[float], tolerance: float, confidence: float = 0.95) -> Judgement:
    """Judge positive observations of a metric for which larger is worse; `tolerance` is relative (0.02: two percent).

    REGRESSION if the whole interval lies above 1 + tolerance, IMPROVEMENT if it lies below 1 - tolerance, PASS if it
    ends at or below 1 + tolerance, TOO_NOISY otherwise. A program that is slower by the tolerance or less is judged a
    regression with probability (1 - confidence) / 2 at most, whatever the noise. Without an interval the verdict is
    PASS if the ratio is at most 1 + tolerance, else TOO_NOISY.
    """
    logs = [math.log(value) for value in base], [math.log(value) for value in new]
    found = Difference.of(base, new)
    shift, error, freedom = found.shift, found.error, found.freedom
    if error is None:
        if shift <= math.log1p(tolerance):
            return Judgement(_exp(shift), None, Verdict.PASS)
        return Judgement(_exp(shift), None, Verdict.TOO_NOISY, _repeats_at_assumed_noise(tolerance, confidence))
    half = quantile(0.5 + confidence / 2, freedom) * error if error else 0.0
    verdict = _verdict(shift - half, shift + half, tolerance)
    needed = _repeats_needed(logs, shift, freedom, tolerance, confidence) if verdict is Verdict.TOO_NOISY else None
    return Judgement(_exp(shift), (_exp(shift - half), _exp(shift + half)), verdict, needed)


def by_ratio(ratio: float, tolerance: float) -> Verdict:
    """The verdict of a ratio that is taken as exact; never TOO_NOISY."""
    shift = math.log(ratio)
    return _verdict(shift, shift, tolerance)


def noise(values: Sequence[float]) -> float | None:
    """Standard deviation of the logarithms (0.01 is about one percent); None for a single observation."""
    return math.sqrt(variance(math.log(value) for value in values)) if len(values) > 1 else None


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def _exp(value: float) -> float:
    return math.exp(max(-_EXPONENT, min(_EXPONENT, value)))


def _verdict(low: float, high: float, tolerance: float) -> Verdict:
    """`low` and `high` are the ends of the interval of the log ratio."""
    if low > math.log1p(tolerance):
        return Verdict.REGRESSION
    if tolerance < 1 and high < math.log1p(-tolerance):
        return Verdict.IMPROVEMENT
    return Verdict.PASS if high <= math.log1p(tolerance) else Verdict.TOO_NOISY


def _variances(base: Sequence[float], new: Sequence[float]) -> tuple[float, float] | None:
    """Variances of both sides; a side with one observation gets the variance of the other."""
    variances = [variance(side) if len(side) > 1 else None for side in (base, new)]
    known = [value for value in variances if value is not None]
    if not known:
        return None
    first, second = (known[0] if value is None else value for value in variances)
    return first, second


def _error(base: Sequence[float], new: Sequence[float]) -> tuple[float | None, float]:
    """Standard error of the difference of the means, and its degrees of freedom."""
    variances = _variances(base, new)
    if variances is None:
        return None, 0.0
    parts = [value / len(side) for value, side in zip(variances, (base, new), strict=True)]
    total = sum(parts)
    if len(base) == 1 or len(new) == 1:
        return math.sqrt(total), max(len(base), len(new)) - 1.0
    below = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (base, new), strict=True))
    return math.sqrt(total), total**2 / below if below else len(base) + len(new) - 2.0


def _repeats_needed(
    logs: tuple[Sequence[float], Sequence[float]], shift: float, freedom: float, tolerance: float, confidence: float
) -> int:
    """Repeats per side after which an unchanged program passes, and one slower by twice the tolerance is detected, each
    with probability POWER. If there are that many already, the ratio is close to the tolerance, and the result is the
    number that distinguishes this ratio from the tolerance.
    """
    variances = _variances(*logs)
    assert variances is not None, "two single observations have no variance"
    factor = (quantile(0.5 + confidence / 2, freedom) + quantile(POWER, freedom)) ** 2 * sum(variances)
    have = min(len(side) for side in logs)
    limit = math.log1p(tolerance)
    for distance in (limit, abs(shift - limit)):
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


@lru_cache(maxsize=4096)
def quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t for a probability of at least 1/2; `freedom` need not be an integer.

    Newton's method, starting at the normal quantile, which is smaller; the distribution function is concave there, so
    every iterate stays below the root and the steps shrink.
    """
    value = NormalDist().inv_cdf(probability)
    for _ in range(200):
        density = math.exp(
            math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
            - (freedom + 1) / 2 * math.log1p(value**2 / freedom)
        )  # fmt: skip
        step = (probability - student(value, freedom)) / density
        value += step
        if abs(step) <= 1e-10 * max(value, 1e-6):
            break
    return value


def student(value: float, freedom: float) -> float:
    """Distribution function of Student's t for value >= 0 (Abramowitz and Stegun 26.7.1)."""
    return 0.5 + incomplete_beta(value**2 / (freedom + value**2), 0.5, freedom / 2) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b): continued fraction DLMF 8.17.22, by Lentz's method."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on one side only
        return 1 - incomplete_beta(1 - x, b, a)
    tiny = 1e-300
    above, below, fraction = 1.0, 0.0, 1.0
    for index in range(1, 2000):
        m = index // 2
        if index % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        below = 1 / ((1 + term * below) or tiny)
        above = (1 + term / above) or tiny
        fraction *= above * below
        if abs(above * below - 1) < 1e-15:
            break
    front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(front) / (fraction * a)
