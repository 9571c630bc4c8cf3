"""The log ratio of processor times, adjusted for the speed of the machine at each dump: an analysis of covariance.

With the logarithms y of processor times and x of the calibrations beside them, and sums over both sides of products of
distances from the mean of the side,

    slope         b = Sxy / Sxx
    log ratio     d = mean y of the new side - that of the base - b D,   D the same difference of the means of x
    variance      s^2 = (Syy - b Sxy) / (n + m - 3)
    error         e = sqrt(s^2 (1/n + 1/m + D^2 / Sxx) f + (SLOPE_ERROR D)^2)

(R. A. Fisher, "Statistical Methods for Research Workers", 1932, section 49.1.) f is the factor of the correlation of
neighbors, as in `log_ratio.drifting`, here of the rests. The slope within a side is not quite that between the sides,
which were measured at other times: a program's memory may be shared with other neighbors. SLOPE_ERROR stands for that,
so sides that were measured at very different speeds of the machine are too noisy to be judged.

Programs that ran in turn have one difference of y, and one of x, for each pair. Their log ratio is the intercept of a
line through these. A history has no sides: its slope is that of neighbors.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from sglang_gen.perf.log_ratio import Difference, Noise

LEAST_OBSERVATIONS = 8  # of both sides, from which a slope is estimated
SLOPE_ERROR = 0.25  # standard error of the slope between two sessions; tools/perf_rates.py has the measurements


def adjusted(
    base: Sequence[float], new: Sequence[float], base_speeds: Sequence[float], new_speeds: Sequence[float]
) -> Difference:
    """The difference of logarithms of processor times; the speeds are logarithms of their calibrations.

    Needs at least LEAST_OBSERVATIONS in total.
    """
    ys, xs = [_rests(side) for side in (base, new)], [_rests(side) for side in (base_speeds, new_speeds)]
    products = sum(x * y for xs_, ys_ in zip(xs, ys, strict=True) for x, y in zip(xs_, ys_, strict=True))
    squares = sum(x * x for side in xs for x in side)
    slope = products / squares if squares else 0.0
    rests = [[y - slope * x for x, y in zip(xs_, ys_, strict=True)] for xs_, ys_ in zip(xs, ys, strict=True)]
    noise, apart = Noise.of(rests), fmean(new_speeds) - fmean(base_speeds)
    plain = noise.difference(base, new)  # of the rests, apart from the shift
    lost = noise.freedom / (noise.freedom - 1)  # the slope is one more parameter
    scale = 1 / len(base) + 1 / len(new)
    inflated = (plain.error or 0.0) ** 2 * lost * (1 + (apart**2 / squares / scale if squares else 0.0))
    error = math.sqrt(inflated + (SLOPE_ERROR * apart) ** 2)
    return Difference(plain.shift - slope * apart, error, max(plain.freedom / lost, 1.0), plain.variance * lost)


def adjusted_pairs(
    base: Sequence[float], new: Sequence[float], base_speeds: Sequence[float], new_speeds: Sequence[float]
) -> Difference:
    """The difference of programs that ran in turn: the intercept of the pairs' differences over those of the speeds.

    Student's t has n - 2 degrees of freedom for n pairs, of which there are at least three.
    """
    ys = [after - before for before, after in zip(base, new, strict=True)]
    xs = [after - before for before, after in zip(base_speeds, new_speeds, strict=True)]
    rests, count, apart = list(zip(_rests(xs), _rests(ys), strict=True)), len(ys), fmean(xs)
    squares = sum(x * x for x, _ in rests)
    slope = sum(x * y for x, y in rests) / squares if squares else 0.0
    variance = sum((y - slope * x) ** 2 for x, y in rests) / (count - 2)
    scale = 1 / count + (apart**2 / squares if squares else 0.0)
    error = math.sqrt(variance * scale + (SLOPE_ERROR * apart) ** 2)
    return Difference(fmean(ys) - slope * apart, error, count - 2.0, variance)


def at_one_speed(values: Sequence[float], speeds: Sequence[float]) -> list[float]:
    """Logarithms of processor times in the order of time, as they would be at the mean speed of all.

    The slope is that of the differences of neighbors, of which a change of the program raises one alone.
    """
    steps = [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(zip(speeds, values, strict=True))]
    squares = sum(x * x for x, _ in steps)
    slope = sum(x * y for x, y in steps) / squares if squares else 0.0
    middle = fmean(speeds)
    return [value - slope * (speed - middle) for value, speed in zip(values, speeds, strict=True)]


def _rests(values: Sequence[float]) -> list[float]:
    middle = fmean(values)
    return [value - middle for value in values]
