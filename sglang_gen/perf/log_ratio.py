"""The log ratio of two sides with its standard error: of independent, drifting, or paired observations.

Observations that are independent have Welch's error, see `statistics`. A machine whose speed drifts makes observations
that are close in time alike. `drifting` estimates this correlation: with the logarithms x_1..x_n of the base and
y_1..y_m of the new program, both in the order of time,

    variance      s^2 = (sum of (x_i - mean x)^2 + sum of (y_i - mean y)^2) / (n + m - 2)
    correlation   r = that of neighbors, in a first-order autoregressive process
    error         e = s sqrt((1/n + 1/m) (1 + r) / (1 - r))

Programs that run in turn have the same drift, which cancels in the differences of pairs: `paired` is Student's t for
the mean of y_i - x_i.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist, fmean, variance

LEAST_FREEDOM = 10.0  # of correlated observations, if there are so many
MOST_CORRELATION = 0.9
_EXPONENT = 50.0  # log ratios are clamped to this, so that exp does not overflow


@dataclass(frozen=True)
class Noise:
    """Of logarithms in segments of constant mean: variance, its degrees of freedom, and correlation of neighbors."""

    variance: float
    freedom: int
    correlation: float

    @classmethod
    def of(cls, segments: Sequence[Sequence[float]]) -> "Noise":
        """Each segment is in the order of time. Its mean is its own, which lowers the correlation of n values by about
        (1 + 3 r) / n (M. G. Kendall, "Note on bias in the estimation of autocorrelation", Biometrika 41, 1954); this
        is added.
        """
        rests = [[value - fmean(segment) for value in segment] for segment in segments]
        squares = sum(rest**2 for segment in rests for rest in segment)
        products = sum(left * right for segment in rests for left, right in pairwise(segment))
        count = sum(map(len, segments))
        freedom, found = count - len(segments), products / squares if squares else 0.0
        correlation = found + len(segments) * (1 + 3 * found) / count
        return cls(squares / max(freedom, 1), freedom, min(max(correlation, 0.0), MOST_CORRELATION))

    def difference(self, base: Sequence[float], new: Sequence[float]) -> "Difference":
        """The difference of the means of two segments of this noise.

        A first-order autoregressive process of n values has the information of n (1 - r) / (1 + r) independent ones,
        which applies to the freedom too, down to LEAST_FREEDOM: the formula is for long series.
        """
        shift = fmean(new) - fmean(base)
        if not self.freedom:
            return Difference(shift, None, 0.0)
        factor = (1 + self.correlation) / (1 - self.correlation)
        error = math.sqrt(self.variance * (1 / len(base) + 1 / len(new)) * factor)
        freedom = max(self.freedom / factor, min(self.freedom, LEAST_FREEDOM))
        return Difference(shift, error, freedom, 2 * self.variance * factor)


@dataclass(frozen=True)
class Difference:
    """A log ratio, its standard error (None if nothing shows the noise) and the degrees of freedom of the error.

    With N observations on each side the error would be sqrt(variance / N). The functions that make a difference take
    logarithms.
    """

    shift: float
    error: float | None
    freedom: float
    variance: float = 0.0

    def p_value(self, tolerance: float) -> float:
        """Of the hypothesis that the ratio is within the tolerance, two-sided; 1 if it is, or without an error."""
        limit = math.log1p(tolerance) if self.shift > 0 else -math.log1p(-tolerance) if tolerance < 1 else math.inf
        beyond = abs(self.shift) - limit
        if self.error is None or beyond <= 0:
            return 1.0
        return 2 * (1 - student(beyond / self.error, self.freedom)) if self.error else 0.0

    def log_interval(self, confidence: float) -> tuple[float, float] | None:
        """The interval of the log ratio."""
        if self.error is None:
            return None
        half = quantile(0.5 + confidence / 2, self.freedom) * self.error if self.error else 0.0
        return self.shift - half, self.shift + half

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """The interval of the ratio."""
        logs = self.log_interval(confidence)
        return logs and (exp(logs[0]), exp(logs[1]))


def independent(base: Sequence[float], new: Sequence[float]) -> Difference:
    """Welch's error and degrees of freedom; a side with one observation gets the variance of the other."""
    sides = (base, new)
    own = [variance(side) if len(side) > 1 else None for side in sides]
    known = [value for value in own if value is not None]
    shift = fmean(new) - fmean(base)
    if not known:
        return Difference(shift, None, 0.0)
    variances = [known[0] if value is None else value for value in own]
    parts = [value / len(side) for value, side in zip(variances, sides, strict=True)]
    error, both = math.sqrt(sum(parts)), sum(variances)
    if min(map(len, sides)) == 1:
        return Difference(shift, error, max(map(len, sides)) - 1.0, both)
    below = sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    return Difference(shift, error, sum(parts) ** 2 / below if below else len(base) + len(new) - 2.0, both)


def drifting(base: Sequence[float], new: Sequence[float]) -> Difference:
    return Noise.of([base, new]).difference(base, new)


def paired(base: Sequence[float], new: Sequence[float]) -> Difference:
    """Both sides have equally many observations; those with the same index are a pair."""
    differences = [after - before for before, after in zip(base, new, strict=True)]
    count, spread = len(differences), variance(differences) if len(differences) > 1 else None
    if spread is None:
        return Difference(fmean(differences), None, 0.0)
    return Difference(fmean(differences), math.sqrt(spread / count), count - 1.0, spread)


class Method(Enum):
    """How the observations of two sides depend on time: not at all, by drift, or as pairs that ran in turn."""

    INDEPENDENT = "independent"
    DRIFTING = "drifting"
    PAIRED = "paired"

    def difference(self, base: Sequence[float], new: Sequence[float]) -> Difference:
        return {"independent": independent, "drifting": drifting, "paired": paired}[self.value](base, new)


def exp(value: float) -> float:
    return math.exp(max(-_EXPONENT, min(_EXPONENT, value)))


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
