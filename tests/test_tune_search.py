"""The search of sglang tune on synthetic cost surfaces: what it finds, within which budget, and what it says."""

import math
import random
from statistics import fmean

import pytest
from cost_surfaces import AXES, CostSurface, products

from sglang_gen.perf.log_ratio import paired
from sglang_gen.tune.blocks import residual_variance
from sglang_gen.tune.candidate import BASE, Bounds, Candidate, CandidateVerdict, Observation
from sglang_gen.tune.halving import entrants, halve, image_counts
from sglang_gen.tune.outcome import candidate_rows
from sglang_gen.tune.search import Search
from sglang_gen.tune.surrogate import Surrogate
from sglang_gen.tune.trials import Trials
from sglang_gen.tune.tuning_table import conclusion_lines, table_lines, why_nothing

LONG = 1e6  # seconds: a budget that no search spends
ONE = Candidate((("compile", "compile=full"),))
OTHER = Candidate((("dtype", "dtype=float32"),))


def searched(surface: CostSurface, budget: float = LONG, memory: float = math.inf, **words: object) -> Search:
    search = Search(AXES, surface, Bounds(surface.least_psnr, memory), budget, **words)
    search.run()
    return search


@pytest.mark.parametrize("seed", range(20))
def test_without_noise_the_search_finds_the_planted_optimum(seed):
    surface = CostSurface(seed)
    surface.interactions.clear()
    search = searched(surface)
    assert search.chosen == surface.optimum()
    assert len({each for each, _ in surface.measured}) < len(products()) / 3


@pytest.mark.parametrize("seed", range(20))
def test_with_interactions_and_noise_the_search_comes_close_to_the_optimum(seed):
    surface = CostSurface(seed, noise=0.03)
    search = searched(surface)
    assert surface.psnr(search.chosen) >= surface.least_psnr
    assert surface.time(search.chosen) <= 1.12 * surface.time(surface.optimum())


@pytest.mark.slow
def test_over_many_surfaces_the_search_misses_the_optimum_rarely():
    lost = []
    for seed in range(100, 140):
        surface = CostSurface(seed, noise=0.02)
        search = searched(surface, budget=1200)
        lost.append(surface.time(search.chosen) / surface.time(surface.optimum()) - 1)
    assert sum(each > 0.02 for each in lost) <= 8
    assert sorted(lost)[20] == pytest.approx(0, abs=1e-9)


def test_two_changes_that_help_only_together_are_found():
    """Neither helps alone, so that the products of useful changes lack them; the neighbours of the best one do not."""
    surface = CostSurface(3)
    surface.interactions.clear()
    surface.shifts = dict.fromkeys(surface.shifts, 0.05)
    surface.errors = dict.fromkeys(surface.errors, 0.0)
    help_each_other = [("compile", "compile=full"), ("guidance", "g=0.5")]
    surface.shifts[help_each_other[1]] = -0.1
    surface.interactions[frozenset(help_each_other)] = -0.6
    assert searched(surface).chosen == surface.optimum() == Candidate(tuple(help_each_other))


@pytest.mark.parametrize("budget", [60, 120, 300, 600])
def test_no_measurement_is_started_that_would_end_after_the_budget(budget):
    surface = CostSurface(1, noise=0.02)
    search = searched(surface, budget=budget)
    assert surface.now <= budget * 1.02  # by the noise of a measurement
    assert search.is_cut == (budget < 600)


def test_more_budget_finds_faster_candidates():
    means = []
    for budget in (80, 200, LONG):
        surfaces = [CostSurface(seed) for seed in range(5)]
        means.append(fmean(surface.time(searched(surface, budget).chosen or BASE) for surface in surfaces))
    assert means[0] > 1.2 * means[2]
    assert means[0] > means[1] >= means[2]


def test_the_same_seed_gives_the_same_search():
    first, second = (CostSurface(7, noise=0.05) for _ in range(2))
    assert searched(first, 900, seed=3).chosen == searched(second, 900, seed=3).chosen
    assert first.measured == second.measured


def test_a_candidate_that_breaks_the_bound_on_the_first_images_is_measured_no_further():
    surface = CostSurface(2)
    hopeless = ("cache", "cache=dbcache")
    surface.errors[hopeless], surface.shifts[hopeless] = 0.1, -3.0
    search = searched(surface)
    assert [images for each, images in surface.measured if hopeless in each.changes] == [2]
    assert search.trials.known[Candidate((hopeless,))].broken is CandidateVerdict.BELOW


def test_a_bound_is_that_of_the_worst_image_of_the_whole_manifest():
    surface = CostSurface(2)
    surface.hardness = [0.2] * 15 + [2.0]
    search = searched(surface)
    assert surface.psnr(search.chosen) >= surface.least_psnr
    broken = [each for each in search.trials.known if search.trials.known[each].broken]
    assert any(surface.psnr(each, 2) >= surface.least_psnr > surface.psnr(each) for each in broken)


def test_a_candidate_that_needs_more_memory_is_not_chosen():
    surface = CostSurface(4)
    best = surface.optimum()
    surface.memory = dict.fromkeys(best.changes[:1], 4000000000.0)
    search = searched(surface, memory=2e9)
    assert best.changes[0] not in search.chosen.changes
    assert CandidateVerdict.OVER in {row.verdict for row in candidate_rows(search)}


def test_the_time_before_the_search_does_not_shorten_its_screening():
    """The reference may take most of the budget."""
    surface = CostSurface(1)
    surface.now = 300.0
    search = searched(surface, budget=600)
    assert len([each for each in search.trials.known if len(each.changes) == 1]) == len(search.singles())


def test_a_base_without_candidates_is_not_repeated():
    surface = CostSurface(1)
    surface.refused = dict.fromkeys(products(), "no")
    assert searched(surface).chosen == BASE
    assert surface.measured == [(BASE, 2), (BASE, 16)]


def test_refused_and_failed_candidates_have_their_reason_and_do_not_end_the_search():
    surface = CostSurface(6)
    surface.refused = {each: "no such kernel" for each in products() if ("dtype", "dtype=float16") in each.changes}
    surface.failing = {each for each in products() if ("layout", "parallel=tp2") in each.changes}
    search = searched(surface)
    rows = {row.candidate: row for row in candidate_rows(search)}
    assert (rows[Candidate((("dtype", "dtype=float16"),))].verdict, search.chosen is None) == ("refused", False)
    assert rows[Candidate((("layout", "parallel=tp2"),))].reason == "memory ran out"
    assert sum(each in surface.failing for each, _ in surface.measured) == 1  # nothing that contains it is tried


def test_if_nothing_keeps_the_bound_the_closest_is_named():
    surface = CostSurface(8, least_psnr=60)
    search = searched(surface)
    assert search.chosen is None
    assert "No candidate keeps 60 dB: the worst of" in why_nothing(search)


def test_if_the_budget_is_too_small_for_the_manifest_this_is_said():
    surface = CostSurface(8)
    search = searched(surface, budget=10)
    assert search.chosen is None
    assert why_nothing(search).startswith("The budget was spent before a candidate had generated all 16 images")


def test_if_nothing_is_faster_the_base_is_chosen():
    surface = CostSurface(9, noise=0.01)
    surface.shifts = dict.fromkeys(surface.shifts, 0.3)
    surface.interactions.clear()
    search = searched(surface)
    assert search.chosen == BASE
    assert conclusion_lines(search, candidate_rows(search))[0] == "No candidate is faster than the base and keeps 34 dB"


def test_of_tied_candidates_the_one_with_fewer_changes_is_chosen():
    """Two changes give as much as one of them: whatever the noise says, the simpler one is chosen, both are named."""
    surface = CostSurface(2, noise=0.03)
    surface.interactions.clear()
    surface.errors = dict.fromkeys(surface.errors, 0.0)
    surface.shifts = dict.fromkeys(surface.shifts, 0.4)
    surface.shifts |= {ONE.changes[0]: -0.7, ("cache", "cache=dbcache"): -0.004}
    search = searched(surface)
    both = Candidate((*ONE.changes, ("cache", "cache=dbcache")))
    assert (search.leader, search.chosen, set(search.tied)) == (both, ONE, {ONE, both})
    assert any(line.startswith("Tied with it") for line in conclusion_lines(search, candidate_rows(search)))


def test_the_baseline_is_measured_beside_the_finalists_and_never_chosen():
    surface = CostSurface(12)
    baseline = Candidate((("baseline", "backend=diffusers dtype=float32"),), is_baseline=True)
    surface.shifts[baseline.changes[0]] = -9.0  # the fastest of all
    search = searched(surface, baseline=baseline)
    assert search.chosen == surface.optimum()
    assert search.trials.difference(search.chosen, baseline).shift < 0
    assert "times as fast as the baseline backend=diffusers" in "".join(
        conclusion_lines(search, candidate_rows(search))
    )


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_a_manifest_of_few_images_is_searched_too(images):
    surface = CostSurface(15, images=images)
    surface.interactions.clear()
    assert searched(surface).chosen == surface.optimum()


def test_the_baseline_is_compared_even_if_the_budget_ends_before_the_finalists():
    surface = CostSurface(12)
    baseline = Candidate((("baseline", "backend=diffusers"),), is_baseline=True)
    surface.shifts[baseline.changes[0]] = 0.5
    search = Search(AXES, surface, Bounds(34), 60, baseline=baseline)
    search.run()
    assert [images for each, images in surface.measured if each == baseline] == [2]
    single = next(each for each in search.trials.known if search.trials.keeps(each) and each not in (BASE, baseline))
    found = math.exp(search.trials.difference(single, baseline).shift)
    assert found == pytest.approx(surface.time(baseline) / surface.time(single))


def test_a_drift_of_the_machine_changes_no_ratio():
    """The machine becomes slower by a half during the search."""
    surface = CostSurface(13)
    original = surface.measure

    def drifting(candidate: Candidate, images: int) -> Observation:
        one = original(candidate, images)
        return Observation(one.seconds * (1 + min(surface.now / 2000, 0.5)), one.psnr, one.memory, one.wall)

    surface.measure = drifting
    search = searched(surface)
    found = math.exp(-search.trials.shift(search.chosen))
    assert found == pytest.approx(surface.time(BASE) / surface.time(search.chosen), rel=0.02)


def test_the_rungs_double_up_to_all_images():
    assert image_counts(16, 2) == [2, 4, 8, 16]
    assert image_counts(64, 2) == [2, 4, 8, 16, 32, 64]
    assert [image_counts(count, 2) for count in (1, 2, 3, 5, 10)] == [[1], [2], [2, 3], [2, 5], [2, 4, 10]]


def test_each_rung_keeps_the_better_half():
    seen = []

    def measure(entries, rung):
        seen.append((len(entries), rung))
        return True

    best = halve(range(16), [2, 4, 8], measure, sorted, 3)
    assert (seen, best) == ([(16, 2), (8, 4), (4, 8)], [0, 1, 2])


def test_halving_ends_when_no_time_is_left():
    assert halve(range(16), [2, 4, 8], lambda entries, rung: rung < 4, sorted, 3) == list(range(8))


def test_the_number_of_entrants_follows_from_the_time():
    assert entrants(100, [10, 20, 40], 48) == 3  # 10 + 20/2 + 40/4 each
    assert (entrants(1e9, [1], 48), entrants(-5, [1], 48), entrants(5, [], 48)) == (48, 0, 48)


def measured(*rounds: dict[Candidate, float]) -> Trials:
    trials = Trials(Bounds(34))
    for seconds in rounds:
        trials.open(4, is_final=True)
        for candidate, value in seconds.items():
            trials.add(candidate, Observation(value, 40.0))
    return trials


def test_two_candidates_in_each_round_have_the_interval_of_students_t():
    times = [(1.0, 0.8), (1.1, 0.85), (1.02, 0.83), (0.97, 0.79)]
    trials = measured(*({BASE: base, ONE: one} for base, one in times))
    expected = paired([math.log(base) for base, _ in times], [math.log(one) for _, one in times])
    found = trials.difference(BASE, ONE)
    assert (found.shift, found.error, found.freedom) == pytest.approx(
        (expected.shift, expected.error, expected.freedom)
    )


def test_the_intervals_cover_the_true_ratio_as_often_as_they_say():
    drawn, covered, count = random.Random(1), 0, 400
    for _ in range(count):
        rounds = []
        for _ in range(4):
            drift = drawn.gauss(0, 0.3)
            rounds.append({each: math.exp(drift + shift + drawn.gauss(0, 0.05))
                           for each, shift in ((BASE, 0.0), (ONE, -0.2), (OTHER, 0.1))})  # fmt: skip
        low, high = measured(*rounds).difference(BASE, ONE).log_interval(0.95)
        covered += low <= -0.2 <= high
    assert 0.92 <= covered / count <= 0.98


def test_the_noise_of_rounds_without_repeats_is_unknown():
    assert residual_variance([{"a": 1.0, "b": 2.0}, {"c": 1.0, "d": 5.0}]) == (0.0, 0)
    assert residual_variance([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.5}, {"c": 0.0}]) == (
        pytest.approx(0.0625),
        1,
    )


def test_the_surrogate_adds_logarithms_of_times_and_squared_errors():
    trials = Trials(Bounds(34))
    trials.open(2)
    for candidate, seconds, psnr in ((BASE, 1.0, 50.0), (ONE, 0.5, 40.0), (OTHER, 0.8, 43.0)):
        trials.add(candidate, Observation(seconds, psnr))
    both = Candidate((*ONE.changes, *OTHER.changes))
    found = Surrogate(trials).predict(both)
    assert found.shift == pytest.approx(math.log(0.4))
    assert found.psnr == pytest.approx(-10 * math.log10(1e-4 + 10**-4.3 - 1e-5))


def test_the_table_fits_the_width_and_has_every_verdict():
    surface = CostSurface(14)
    surface.refused = {Candidate((("cache", "cache=scm_fast"),)): "the model has 8 steps"}
    search = searched(surface)
    lines = table_lines(search, candidate_rows(search), 100)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert all(
        word in text for word in ("chosen", "too slow", "cache=scm\\_fast" if False else "cache=scm_fast: refused")
    )
    narrow = table_lines(search, candidate_rows(search), 60)
    assert max(map(len, narrow)) <= 60


def broken_base(seed: int, remedy: tuple[str, str]) -> CostSurface:
    """A surface whose base has 30 dB, and one change that brings it to 50 dB and makes it slower."""
    surface = CostSurface(seed)
    surface.interactions.clear()
    surface.hardness, surface.base_error = [1.0] * 16, 1e-3
    surface.errors = dict.fromkeys(surface.errors, 0.0) | {remedy: -0.99e-3}
    surface.shifts[remedy] = 0.4
    return surface


@pytest.mark.parametrize("remedy", [("dtype", "dtype=float32"), ("layout", "parallel=tp2")])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("is_predicted", [False, True])
def test_a_slower_candidate_is_chosen_where_the_base_breaks_the_bound(seed, remedy, is_predicted):
    surface = broken_base(seed, remedy)
    if is_predicted:  # and would not be measured beside a base that keeps it
        surface.slower[Candidate((remedy,))] = 1.5
    search = searched(surface)
    assert search.chosen == surface.optimum()
    assert remedy in search.chosen.changes
    assert any(len(each.changes) > 1 for each in search.promising)
    assert all(remedy in each.changes for each in search.promising)
    lines = conclusion_lines(search, candidate_rows(search))
    assert lines[1] == "The base does not keep the bounds (below the bound): the worst of 16 images 30.00 dB, 1 GB"


def test_a_slower_candidate_is_found_where_the_base_breaks_the_bound_on_later_images():
    surface = broken_base(0, ("dtype", "dtype=float32"))
    surface.hardness = [0.1] * 4 + [1.0] * 12
    surface.shifts = {change: abs(shift) for change, shift in surface.shifts.items()}
    surface.slower[Candidate((("dtype", "dtype=float32"),))] = 1.5
    assert searched(surface).chosen == surface.optimum() == Candidate((("dtype", "dtype=float32"),))


def test_a_slower_candidate_is_chosen_where_the_base_takes_too_much_memory():
    surface = CostSurface(0)
    small = ("layout", "parallel=sp2")
    surface.shifts = {change: abs(shift) for change, shift in surface.shifts.items()}
    surface.errors = dict.fromkeys(surface.errors, 0.0)
    surface.memory = {small: -5e8}
    surface.interactions.clear()
    assert searched(surface, memory=6e8).chosen == Candidate((small,))


def test_a_candidate_that_is_predicted_to_be_slower_is_not_measured_beside_a_base_that_keeps_the_bounds():
    surface = CostSurface(0)
    change = Candidate((("dtype", "dtype=float32"),))
    surface.slower[change] = 1.5
    search = searched(surface)
    assert change not in {each for each, _ in surface.measured}
    assert search.trials.known[change].lost == (
        CandidateVerdict.REFUSED,
        "a step is predicted to take 1.50 times as long as that of the base",
    )


def test_the_sentence_without_a_candidate_names_the_bound_that_none_keeps():
    surface = CostSurface(4)
    assert why_nothing(searched(surface, memory=5e8)) == (
        "No candidate keeps 0.5 GB: base takes the least, 1 GB; raise --max-memory, or let the search change more axes"
    )
    trials = Search(AXES, surface, Bounds(34.0), LONG)
    trials.trials.lose(BASE, CandidateVerdict.FAILED, "No space left on device")
    assert why_nothing(trials) == "No candidate could be measured: base: No space left on device"


def test_candidates_that_are_tied_with_as_many_changes_are_not_said_to_have_more():
    surface = CostSurface(0)
    surface.shifts = dict.fromkeys(surface.shifts, 0.2)
    surface.errors = dict.fromkeys(surface.errors, 0.0)
    surface.interactions.clear()
    alike = [("compile", "compile=full"), ("guidance", "g=0.5")]
    surface.shifts |= dict.fromkeys(alike, -0.3)
    surface.interactions[frozenset(alike)] = 0.6
    search = searched(surface)
    said = "\n".join(conclusion_lines(search, candidate_rows(search)))
    assert set(search.tied) == {Candidate((change,)) for change in alike}
    (other,) = {*search.tied} - {search.chosen}
    assert f"Tied with it, and measured slower: {other}" in said


def test_an_interrupted_search_says_so_of_what_it_has_not_measured():
    search = searched(CostSurface(0), budget=20)
    search.is_interrupted = True
    text = "\n".join(table_lines(search, candidate_rows(search), 200))
    assert "not measured, the search was interrupted" in text
    assert "budget was spent" not in text


@pytest.mark.parametrize("seed", range(6))
def test_what_is_closer_than_a_base_that_breaks_the_bound_later_is_tried_first(seed):
    """The budget does not suffice for the others, which are faster and break the bound on the later images too."""
    surface = broken_base(seed, ("dtype", "dtype=float32"))
    surface.hardness = [0.1] * 4 + [1.0] * 12
    search = searched(surface, budget=300)
    assert search.chosen is not None
    assert ("dtype", "dtype=float32") in search.chosen.changes


def test_if_the_budget_is_spent_before_those_that_keep_the_bound_have_all_images_this_is_said():
    surface = broken_base(0, ("dtype", "dtype=float32"))
    surface.hardness = [0.1] * 4 + [1.0] * 12
    search = searched(surface, budget=130)
    assert search.chosen is None
    assert "raise --budget" in why_nothing(search)


def test_a_change_that_saves_memory_is_combined_with_the_others_where_the_base_takes_too_much():
    surface = CostSurface(0)
    surface.interactions.clear()
    surface.errors = dict.fromkeys(surface.errors, 0.0)
    small, fast = ("layout", "parallel=sp2"), ("layout", "parallel=tp2")
    surface.shifts |= {small: 0.1, fast: -0.3}
    surface.memory = {small: -5e8}
    search = searched(surface, budget=400, memory=6e8)
    assert search.promising
    assert all(small in each.changes for each in search.promising)
    allowed = [each for each in products() if small in each.changes]
    assert surface.time(search.chosen) <= 1.02 * min(map(surface.time, allowed))


def test_a_candidate_that_is_predicted_to_be_much_slower_does_not_overrun_the_budget():
    surface = broken_base(0, ("dtype", "dtype=float32"))
    slow = Candidate((("dtype", "dtype=float16"),))
    surface.shifts["dtype", "dtype=float16"] = math.log(300)
    surface.slower[slow] = 300.0
    searched(surface, budget=300)
    assert surface.now <= 300 * 1.02
