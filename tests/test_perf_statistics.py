"""The verdict's statistics: against tables and closed forms, and by simulation with known noise."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_gen.perf.log_ratio import drifting, incomplete_beta, independent, paired, quantile, student
from sglang_gen.perf.statistics import ASSUMED_NOISE, MOST_REPEATS, Verdict, _verdict, by_ratio, judge, noise

TOLERANCE = 0.02


def times(generator: random.Random, count: int, spread: float, factor: float = 1.0) -> list[float]:
    """Log-normal run times around `factor` seconds."""
    return [1000 * factor * math.exp(generator.gauss(0, spread)) for _ in range(count)]


def verdicts(trials: int, repeats: int, spread: float, factor: float, seed: int = 0) -> dict[Verdict, float]:
    """How often each verdict is given, as a share."""
    generator = random.Random(seed)
    found = [
        judge(times(generator, repeats, spread), times(generator, repeats, spread, factor), TOLERANCE).verdict
        for _ in range(trials)
    ]
    return {verdict: found.count(verdict) / trials for verdict in Verdict}


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.975, 8, 2.3060), (0.975, 30, 2.0423),
        (0.95, 8, 1.8595), (0.9, 3, 1.6377), (0.9, 8, 1.3968), (0.995, 5, 4.0321), (0.975, 1e6, 1.9600), (0.5, 3, 0.0),
    ],
)  # fmt: skip
def test_quantiles_of_t_are_those_of_the_tables(probability, freedom, expected):
    assert quantile(probability, freedom) == pytest.approx(expected, abs=5e-5)


@given(st.floats(0, 1e4))
def test_the_distribution_of_t_has_its_closed_forms(value):
    assert student(value, 1) == pytest.approx(0.5 + math.atan(value) / math.pi, abs=1e-12)
    assert student(value, 2) == pytest.approx(0.5 + value / (2 * math.sqrt(2 + value**2)), abs=1e-12)


@given(st.floats(0.5001, 0.9999), st.floats(1, 1e4))
@settings(deadline=None, derandomize=True, database=None)
def test_the_quantile_inverts_the_distribution(probability, freedom):
    assert student(quantile(probability, freedom), freedom) == pytest.approx(probability, abs=1e-9)


@given(st.floats(0.01, 0.99), st.floats(0.5, 50), st.floats(0.5, 50))
def test_the_incomplete_beta_function_is_symmetric(x, a, b):
    assert incomplete_beta(x, a, b) == pytest.approx(1 - incomplete_beta(1 - x, b, a), abs=1e-10)


def test_the_interval_is_welchs():
    base, new = [100.0, 101.0, 99.0], [110.0, 114.0, 107.0, 111.0]
    judged = judge(base, new, TOLERANCE)
    assert judged.interval is not None
    assert judged.ratio == pytest.approx(statistics.geometric_mean(new) / statistics.geometric_mean(base), rel=1e-12)
    u, v = (noise(side) ** 2 / len(side) for side in (base, new))
    freedom = (u + v) ** 2 / (u**2 / 2 + v**2 / 3)
    half = quantile(0.975, freedom) * math.sqrt(u + v)
    expected = judged.ratio * math.exp(-half), judged.ratio * math.exp(half)
    assert judged.interval == pytest.approx(expected, rel=1e-12)
    assert judged.verdict is Verdict.REGRESSION


@pytest.mark.parametrize(
    ("left", "right", "spreads"), [(5, 5, (0.02, 0.02)), (3, 8, (0.01, 0.05)), (1, 6, (0.02, 0.02))]
)
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(left, right, spreads):
    generator, trials, held = random.Random(1), 1000, 0
    for _ in range(trials):
        base, new = times(generator, left, spreads[0]), times(generator, right, spreads[1], 1.03)
        low, high = judge(base, new, TOLERANCE).interval
        held += low <= 1.03 <= high
    assert 0.93 <= held / trials <= 0.975


@pytest.mark.parametrize("repeats", [2, 3, 5, 10])
@pytest.mark.parametrize("spread", [0.005, 0.02, 0.1])
def test_an_unchanged_program_is_rarely_called_a_regression(repeats, spread):
    assert verdicts(500, repeats, spread, factor=1.0)[Verdict.REGRESSION] <= 0.05


@pytest.mark.parametrize("spread", [0.005, 0.1])
def test_a_program_slower_by_the_tolerance_is_rarely_called_a_regression(spread):
    assert verdicts(900, 5, spread, factor=1 + TOLERANCE)[Verdict.REGRESSION] <= 0.05


def test_a_planted_slowdown_and_a_planted_speedup_are_found():
    assert verdicts(500, 5, 0.01, factor=1.05)[Verdict.REGRESSION] >= 0.95
    assert verdicts(500, 5, 0.01, factor=0.95)[Verdict.IMPROVEMENT] >= 0.95
    assert verdicts(500, 5, 0.01, factor=1.05)[Verdict.PASS] <= 0.01
    assert verdicts(500, 5, 0.005, factor=1.0)[Verdict.PASS] >= 0.95


def test_wide_noise_is_too_noisy():
    found = verdicts(500, 3, 0.05, factor=1.0)
    assert found[Verdict.TOO_NOISY] >= 0.8
    assert found[Verdict.REGRESSION] <= 0.05


@pytest.mark.parametrize("factor", [1.0, (1 + TOLERANCE) ** 2])
def test_the_predicted_number_of_repeats_decides(factor):
    generator, decided, right, trials = random.Random(2), 0, 0, 120
    expected = Verdict.REGRESSION if factor > 1 else Verdict.PASS
    for _ in range(trials):
        judged = judge(times(generator, 4, 0.04), times(generator, 4, 0.04, factor), TOLERANCE)
        if judged.verdict is not Verdict.TOO_NOISY:
            continue
        assert judged.repeats_needed > 4
        count = judged.repeats_needed
        again = judge(times(generator, count, 0.04), times(generator, count, 0.04, factor), TOLERANCE)
        decided += 1
        right += again.verdict is expected
    assert decided >= 80
    assert right / decided >= 0.85  # 0.9 is planned


def test_a_ratio_at_the_tolerance_itself_asks_for_more_repeats_than_there_are():
    base = [100.0 * factor for factor in (0.99, 1.0, 1.01)] * 20
    new = [value * 1.0205 for value in base]
    judged = judge(base, new, TOLERANCE)
    assert judged.verdict is Verdict.TOO_NOISY
    assert judged.repeats_needed > 60
    exactly = judge(base, [value * 1.02 for value in base], TOLERANCE)
    assert exactly.repeats_needed >= 10_000


def test_single_observations_pass_within_the_tolerance_and_need_repeats_beyond_it():
    for value, verdict, needed in [
        (50.0, Verdict.PASS, None),
        (101.9, Verdict.PASS, None),
        (102.1, Verdict.TOO_NOISY, 8),
        (500.0, Verdict.TOO_NOISY, 8),
    ]:
        judged = judge([100.0], [value], TOLERANCE)
        assert (judged.interval, judged.verdict, judged.repeats_needed) == (None, verdict, needed)


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9), st.floats(0, 2), st.floats(0.5, 0.9999))
def test_one_observation_a_side_is_never_a_regression(base, new, tolerance, confidence):
    judged = judge([base], [new], tolerance, confidence)
    assert judged.verdict in (Verdict.PASS, Verdict.TOO_NOISY)
    assert judged.repeats_needed is None or judged.repeats_needed >= 2
    assert by_ratio(new / base, tolerance) in (Verdict.PASS, Verdict.IMPROVEMENT, Verdict.REGRESSION)


@pytest.mark.parametrize("tolerance", [0.005, 0.02, 0.1])
def test_the_repeats_for_single_observations_decide_at_the_assumed_noise(tolerance):
    needed = judge([100.0], [200.0], tolerance).repeats_needed
    generator, right, trials = random.Random(4), 0, 200
    for _ in range(trials):
        base, new = (times(generator, needed, ASSUMED_NOISE) for _ in range(2))
        right += judge(base, new, tolerance).verdict in (Verdict.PASS, Verdict.IMPROVEMENT)
    assert right / trials >= 0.85  # 0.9 is planned
    assert judge([100.0], [200.0], 0.0).repeats_needed == MOST_REPEATS


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.0199, Verdict.PASS), (1.0201, Verdict.REGRESSION), (0.9799, Verdict.IMPROVEMENT)]
)
def test_a_ratio_that_is_taken_as_exact_is_compared_with_the_tolerance(ratio, verdict):
    assert by_ratio(ratio, TOLERANCE) is verdict


def test_an_interval_that_ends_at_a_tolerance_is_within_it():
    above, below = math.log1p(TOLERANCE), math.log1p(-TOLERANCE)
    assert [_verdict(below, above, TOLERANCE), _verdict(above, above, TOLERANCE)] == [Verdict.PASS] * 2
    assert _verdict(below, below, TOLERANCE) is Verdict.PASS
    assert _verdict(above, math.nextafter(above, 1), TOLERANCE) is Verdict.TOO_NOISY
    further = math.nextafter(above, 1), math.nextafter(below, -1)
    assert _verdict(further[0], further[0], TOLERANCE) is Verdict.REGRESSION
    assert _verdict(further[1], further[1], TOLERANCE) is Verdict.IMPROVEMENT


def test_repeats_without_any_scatter_give_a_point():
    judged = judge([100.0, 100.0], [103.0, 103.0, 103.0], TOLERANCE)
    assert judged.interval == pytest.approx((1.03, 1.03))
    assert judged.verdict is Verdict.REGRESSION


positive = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=6)


@given(positive, positive, st.floats(0, 2))
def test_any_observations_get_a_verdict_and_an_interval_around_the_ratio(base, new, tolerance):
    judged = judge(base, new, tolerance)
    assert (judged.interval is None) == (len(base) == len(new) == 1)
    assert (judged.repeats_needed is not None) == (judged.verdict is Verdict.TOO_NOISY)
    if judged.interval:
        assert 0 < judged.interval[0] <= judged.ratio <= judged.interval[1] < math.inf


@given(positive, st.floats(0.1, 10))
def test_the_verdict_does_not_depend_on_the_unit(base, scale):
    new = [value * 1.5 for value in base]
    first = judge(base, new, TOLERANCE)
    second = judge([value * scale for value in base], [value * scale for value in new], TOLERANCE)
    assert first.ratio == pytest.approx(second.ratio)


def drifts(generator: random.Random, count: int) -> list[float]:
    """Times of a machine whose speed drifts by 4 %, most of it slowly."""
    level, found = 0.0, []
    for _ in range(count):
        level = 0.8 * level + 0.6 * generator.gauss(0, 0.04)
        found.append(math.exp(level + generator.gauss(0, 0.005)))
    return found


def rate(method, factor: float, wanted: Verdict) -> float:
    """How often 20 observations after 20 others, or in turn with them, are judged so."""
    generator, found = random.Random(7), 0
    for _ in range(200):
        series = drifts(generator, 40)
        base, new = (series[::2], series[1::2]) if method is paired else (series[:20], series[20:])
        found += judge(base, [value * factor for value in new], TOLERANCE, 0.95, method).verdict is wanted
    return found / 200


def test_drift_makes_false_regressions_of_independent_observations_only():
    assert rate(independent, 1.0, Verdict.REGRESSION) > 0.08
    assert rate(drifting, 1.0, Verdict.REGRESSION) <= 0.02
    assert rate(paired, 1.0, Verdict.REGRESSION) <= 0.02


def test_pairs_find_a_slowdown_that_is_lost_in_the_drift():
    assert rate(paired, 1.1, Verdict.REGRESSION) >= 0.95
    assert rate(drifting, 1.1, Verdict.REGRESSION) < 0.8


def test_the_interval_of_pairs_is_students():
    base, new = [100.0, 120.0, 90.0, 110.0], [104.0, 125.0, 93.0, 116.0]
    logs = [math.log(after / before) for before, after in zip(base, new, strict=True)]
    half = quantile(0.975, 3) * statistics.stdev(logs) / 2
    judged = judge(base, new, TOLERANCE, 0.95, paired)
    middle = statistics.fmean(logs)
    assert judged.interval == pytest.approx((math.exp(middle - half), math.exp(middle + half)))
    assert judged.verdict is Verdict.REGRESSION
    assert judge(base, new, TOLERANCE).verdict is Verdict.TOO_NOISY
