"""Schedules of the planned step cache: dynamic programming equals brute force, and bisection keeps its bound."""

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_gen.errors import UserError
from sglang_gen.tune.plan_schedule import PlannedSchedule, Planner, expected_error
from sglang_gen.tune.plan_search import PlanMeasurement, PlanSearch
from sglang_gen.tune.prompt_split import split_samples
from sglang_gen.types import Sample


@st.composite
def planners(draw, most_steps: int = 6) -> Planner:
    steps, blocks, span = draw(st.integers(2, most_steps)), draw(st.integers(2, 4)), draw(st.integers(1, most_steps))
    depths = draw(st.sets(st.integers(0, blocks - 1), min_size=1, max_size=2))
    keys = [(source, step, depth) for step in range(1, steps) for source in range(max(0, step - span), step)
            for depth in sorted(depths)]  # fmt: skip
    sizes = st.sampled_from((0.0, 0.25, 0.5, 1.0, 3.0)) | st.floats(0, 1, allow_subnormal=False)
    errors = {key: draw(sizes) for key in keys if draw(st.integers(0, 9))}
    costs = {depth: draw(st.integers(0, blocks - 1)) for depth in depths}
    return Planner(errors, steps, blocks, costs)


def cost(planner: Planner, schedule: tuple[int | None, ...]) -> int:
    return sum(planner.blocks if depth is None else planner.costs[depth] for depth in schedule)


def schedules(planner: Planner) -> Iterator[PlannedSchedule]:
    """All schedules that reuse only what was calibrated."""
    depths = [None, *sorted({depth for _, _, depth in planner.errors})]
    for rest in itertools.product(depths, repeat=planner.steps - 1):
        schedule = (None, *rest)
        blocks = cost(planner, schedule)
        error = expected_error(planner.errors, schedule)
        if math.isfinite(error):
            yield PlannedSchedule(schedule, blocks, error)


def compare_with_brute_force(planner: Planner) -> None:
    possible = list(schedules(planner))
    assert planner.least == min(each.blocks for each in possible)
    before = math.inf
    for budget in range(planner.least, planner.most + 1):
        found = planner.schedule(budget)
        best = min(each.error for each in possible if each.blocks <= budget)
        assert found.error == pytest.approx(best, rel=1e-12, abs=1e-12)
        assert found in possible or expected_error(planner.errors, found.depths) == pytest.approx(found.error)
        assert cost(planner, found.depths) == found.blocks <= budget
        assert found.depths[0] is None
        assert found.error <= before, "more blocks never cost quality"
        before = found.error


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(planners(5))
def test_the_schedule_is_that_of_brute_force_for_every_budget(planner):
    compare_with_brute_force(planner)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(planners(8))
def test_the_schedule_is_that_of_brute_force_for_up_to_eight_steps(planner):
    compare_with_brute_force(planner)


def test_of_equal_errors_the_fewest_blocks_are_computed():
    planner = Planner({(0, 1, 0): 0.5, (0, 1, 1): 0.5}, 2, 3, {0: 0, 1: 1})
    assert planner.schedule(5) == PlannedSchedule((None, 0), 3, 0.5)
    assert planner.schedule(6) == PlannedSchedule((None, None), 6, 0.0)


def test_a_budget_below_the_smallest_schedule_is_an_error():
    with pytest.raises(ValueError, match="the smallest schedule computes 8 blocks"):
        Planner({(0, 1, 2): 0.1}, 3, 3, {2: 2}).schedule(2)


def falling(scale: float) -> Planner:
    """A schedule loses more, the further apart its computed steps are."""
    errors = {(source, step, depth): scale * (step - source) * (1 - depth / 4)
              for step in range(1, 12) for source in range(max(0, step - 8), step) for depth in (0, 2)}  # fmt: skip
    return Planner(errors, 12, 4, {0: 0, 2: 2})


def measure(schedule: PlannedSchedule) -> PlanMeasurement:
    psnr = -10 * math.log10(schedule.error) if schedule.error else math.inf
    return PlanMeasurement(psnr, psnr + 3, schedule.blocks / 48)


@pytest.mark.parametrize("bound", [5.0, 15.0, 20.0, 23.0, 26.0, 28.0])
def test_the_bisection_finds_the_fewest_blocks_that_keep_the_bound(bound):
    search = PlanSearch(falling(0.001), measure)
    found = search.bisect(bound)
    every = [search.planner.schedule(budget) for budget in range(search.planner.least, search.planner.most)]
    kept = [schedule for schedule in every if measure(schedule).worst >= bound]
    assert (found and found.schedule.blocks) == min((schedule.blocks for schedule in kept), default=None)
    assert len(search.trials) <= 8


def test_a_schedule_is_measured_once():
    seen: list[tuple[int | None, ...]] = []
    search = PlanSearch(falling(0.001), lambda schedule: (seen.append(schedule.depths), measure(schedule))[1])
    search.bisect(20.0)
    search.bisect(20.0)
    assert len(seen) == len(set(seen))


def test_no_schedule_is_found_for_a_bound_that_only_the_exact_run_keeps():
    assert PlanSearch(falling(1.0), measure).bisect(90.0) is None


def samples(*prompts: str) -> list[Sample]:
    return [Sample(index, prompt, None, index) for index, prompt in enumerate(prompts)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from("abcdefghijklmnopqrst"), min_size=2, max_size=30), st.none() | st.integers(1, 8))
def test_no_prompt_is_both_calibrated_and_measured(prompts, count):
    several = len(set(prompts))
    if several < 2 or (count or 1) >= several:
        with pytest.raises(UserError):
            split_samples(samples(*prompts), count)
        return
    split = split_samples(samples(*prompts), count)
    calibrated, measured = ({sample.prompt for sample in part} for part in (split.calibrated, split.measured))
    assert not calibrated & measured
    assert len(split.calibrated) + len(split.measured) == len(prompts)
    assert len(calibrated) == (count or min(8, several // 2))
