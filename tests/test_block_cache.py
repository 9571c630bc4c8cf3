"""DBCache's decisions and extrapolation are those of the cache-dit library, and its chain computes what it claims."""

import cache_dit
import cached
import pytest
import torch
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_gen.engine.caching.block_cache import BlockCache
from sglang_gen.engine.caching.cached_chain import Evaluation, generation
from sglang_gen.engine.caching.decider import Decider, Rules
from sglang_gen.engine.caching.extrapolation import History
from sglang_gen.engine.caching.static_cache import StaticCache
from sglang_gen.models.chain import Chain
from sglang_gen.types import Layout

STEPS = 12


@st.composite
def rules(draw) -> Rules:
    mask = draw(st.none() | st.lists(st.integers(0, 1), min_size=STEPS - 1, max_size=STEPS - 1))
    return Rules(
        threshold=draw(st.sampled_from((0.0, 0.05, 0.2, 0.9, 1.0, 5.0))),
        accumulated=draw(st.none() | st.sampled_from((0.2, 0.5, 2.0))),
        warmup=draw(st.integers(0, STEPS)),
        warmup_interval=draw(st.integers(1, 4)),
        mask=None if mask is None else (1, *mask),
        static=mask is not None and draw(st.booleans()),
        most=draw(st.sampled_from((-1, 0, 1, 2, 5))),
        most_in_a_row=draw(st.sampled_from((-1, 0, 1, 2))),
    )


def library(rules: Rules, changes: list[float]) -> list[bool]:
    """Which steps cache-dit reuses if the residual changes by these amounts."""
    manager = CachedContextManager("test")
    config = cache_dit.DBCacheConfig(
        residual_diff_threshold=rules.threshold, max_accumulated_residual_diff_threshold=rules.accumulated,
        max_warmup_steps=rules.warmup, warmup_interval=rules.warmup_interval, max_cached_steps=rules.most,
        max_continuous_cached_steps=rules.most_in_a_row, enable_separate_cfg=False,
        steps_computation_mask=None if rules.mask is None else list(rules.mask),
        steps_computation_policy="static" if rules.static else "dynamic",
    )  # fmt: skip
    context = manager.new_context(name="test", cache_config=config)
    manager.set_context(context)
    reused = []
    for change in changes:
        manager.mark_step_begin()
        reused.append(manager.can_cache(torch.tensor([1.0 + change], dtype=torch.float64), prefix="Fn_residual"))
        if reused[-1]:
            manager.add_cached_step()
        else:
            manager.set_Fn_buffer(torch.ones(1, dtype=torch.float64), prefix="Fn_residual")
    return reused


def own(rules: Rules, changes: list[float]) -> list[bool]:
    decider, reused = Decider(rules), []
    for step, change in enumerate(changes):
        decider.begin(step)
        known = decider.without_residual(step) if step else False
        reused.append(decider.with_residual(change) if known is None else known)
        if reused[-1]:
            decider.reuse(step)
    return reused


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(rules(), st.lists(st.sampled_from((0.0, 0.03, 0.1, 0.5, 2.0)), min_size=STEPS, max_size=STEPS))
def test_the_decisions_are_those_of_cache_dit(rules, changes):
    assert own(rules, changes) == library(rules, changes)


def test_small_changes_add_up_until_nothing_more_is_reused():
    rules, changes = Rules(0.2, accumulated=0.25), [0.1] * 6
    assert own(rules, changes) == library(rules, changes) == [False, True, True, True, False, False]


STATIC = Rules(0.0, mask=(1, 1, 0, 1, 0, 0, 1, 0, 0, 0), static=True)
ALL = [((1, 0), False)] * 10
INTERVAL = [((1, 0), False)] * 5 + [((0,), False)] * 5
IN_TURN = [((branch,), True) for _ in range(5) for branch in (1, 0)]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("calls", [ALL, INTERVAL, IN_TURN], ids=["both", "interval", "in turn"])
def test_a_fixed_plan_is_what_the_general_cache_does_with_it(calls, order):
    """The one is made to be compiled and captured, the other knows each image."""
    outputs, decisions = [], []
    for cache in (BlockCache(STATIC, 1, 1, order), StaticCache(STATIC, 1, 1, order)):
        made = []
        with generation([cache]):
            for call, (branches, sequential) in enumerate(calls):
                step = call // 2 if sequential else call
                evaluation = Evaluation(call, step, branches, branches, 1, sequential)
                x = inputs(10, 2)[step][: len(branches)]
                cache.before(evaluation)
                made.append(cache(cached.BLOCKS, (x, torch.ones(len(x), 2, 4)), cached.conditions(x), ())[0])
                cache.after(evaluation)
        outputs.append(made)
        decisions.append(cache.decisions)
    assert decisions[0] == decisions[1]
    assert {each.decision for each in decisions[0]} == {"computed", "extrapolated" if order else "reused"}
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 4), st.lists(st.booleans(), min_size=8, max_size=12))
def test_the_extrapolation_is_that_of_cache_dit(order, computed):
    ours, theirs = History(order), TaylorSeerState(n_derivatives=order)
    values = torch.randn(len(computed), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    for step, value in enumerate(values):
        if step:  # the library makes its state in the first step, after that step was counted
            theirs.mark_step_begin()
        if computed[step] or not step:
            ours.add(step, value)
            theirs.update(value)
        else:
            assert torch.equal(ours.at(step), theirs.approximate())


def test_without_an_order_the_last_value_is_repeated():
    history = History(0)
    for step in range(5):
        history.add(step, torch.tensor([float(step**2)]))
    assert history.at(9) == 16


def run(cache: BlockCache | Chain, inputs: list[torch.Tensor], images: int, branches=(0,), together=None, **given):
    """The images of each step; the inputs have a row per branch and image."""
    outputs = []
    with generation([cache] if isinstance(cache, BlockCache) else []):
        for step, x in enumerate(inputs):
            cache.evaluation = Evaluation(step, step, branches, together or branches, images, **given)
            state = cache(cached.BLOCKS, (x, torch.ones(len(x), 2, 4)), cached.conditions(x), ())
            outputs.append(state[0])
    return outputs


def inputs(steps: int, rows: int, change: float = 0.02) -> list[torch.Tensor]:
    start = torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(0))
    return [start * (1 + change * (1 + torch.arange(rows))[:, None, None]) ** step for step in range(steps)]


@pytest.mark.parametrize("rules", [Rules(0.0), Rules(0.5, mask=(1,) * 6), Rules(0.5, warmup=6), Rules(0.5, most=0)])
def test_a_cache_that_reuses_nothing_is_the_chain_bit_for_bit(rules):
    given = inputs(6, 4)
    for cached_step, exact in zip(run(BlockCache(rules, 1, 1), given, 4), run(Chain(), given, 4), strict=True):
        assert torch.equal(cached_step, exact)


def test_an_image_decides_for_itself_whatever_its_batch():
    cache, given = BlockCache(Rules(0.05, warmup=2), 1), inputs(8, 3)
    together = run(cache, given, 3)
    decided = {(each.image, each.step): each.decision for each in cache.decisions}
    assert len({decided[image, 3] for image in range(3)}) == 2, "some images reuse the step and some compute it"
    for image in range(3):
        alone = run(cache, [x[image : image + 1] for x in given], 1)
        for batch, single in zip(together, alone, strict=True):
            assert torch.allclose(batch[image : image + 1], single, rtol=1e-6, atol=1e-6)
        assert [each.decision for each in cache.decisions] == [decided[image, step] for step in range(8)]


def branches_of(cache: BlockCache, step: int) -> list[str]:
    return [each.decision for each in cache.decisions if each.step == step]


@pytest.mark.parametrize(("separate", "alike"), [(None, True), (False, True), (True, False)])
def test_branches_in_one_call_decide_together_unless_they_are_to_decide_alone(separate, alike):
    cache = BlockCache(Rules(0.0233), 1, separate=separate)
    given = inputs(8, 2, change=0.05)
    run(cache, given, 1, branches=(1, 0))
    assert all(len(set(branches_of(cache, step))) == 1 for step in range(8)) is alike


def test_branches_one_after_the_other_decide_alone_by_default():
    cache = BlockCache(Rules(0.0233), 1)
    with generation([cache]):
        for step, x in enumerate(inputs(8, 2, change=0.05)):
            for branch in (1, 0):
                cache.evaluation = Evaluation(step, step, (branch,), (branch,), 1, sequential=True)
                cache(cached.BLOCKS, (x[branch : branch + 1], torch.ones(1, 2, 4)), cached.conditions(x[:1]), ())
    assert any(len(set(branches_of(cache, step))) == 2 for step in range(8))


def test_a_step_with_other_branches_than_the_last_computed_one_is_computed():
    cache, given = BlockCache(Rules(0.9), 1), inputs(6, 2)
    with generation([cache]):
        for step, x in enumerate(given):
            branches = (1, 0) if step < 3 else (0,)
            x = x if step < 3 else x[1:]
            cache.evaluation = Evaluation(step, step, branches, branches, 1)
            cache(cached.BLOCKS, (x, torch.ones(len(x), 2, 4)), cached.conditions(x), ())
    assert [branches_of(cache, step)[0] for step in range(6)] == [
        "computed", "reused", "reused", "computed", "reused", "reused",
    ]  # fmt: skip


def fail_in_a_generation(cache: BlockCache, error: type[BaseException]) -> None:
    x = inputs(1, 1)[0]
    with generation([cache]):
        cached.evaluate(cache, Evaluation(0, 0, (0,), (0,), 1), x)
        assert cache.units
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_generation_that_failed_or_was_interrupted(error):
    cache = BlockCache(Rules(0.9), 1)
    with pytest.raises(error):
        fail_in_a_generation(cache, error)
    assert not cache.units
    assert cache.evaluation is None


@pytest.mark.parametrize(
    "layout", [Layout(ring=2), Layout(tp=2), Layout(cfg=2), Layout(ring=2, ulysses=2, tp=2)], ids=str
)
def test_ranks_that_disagree_fail_instead_of_waiting_for_each_other(ranks, layout):
    answers = ranks.run(layout, cached.decide_differently)
    assert all("disagree on whether step 1 is reused" in answer for answer in answers), answers


@pytest.mark.parametrize("layout", [Layout(ring=3), Layout(cfg=2), Layout(ring=2, ulysses=2, tp=2)], ids=str)
def test_ranks_with_unequal_shards_compare_what_one_process_compares(ranks, layout):
    expected = cached.changes_of(cached.TOKENS, layout.cfg)
    for changes in ranks.run(layout, cached.changes_on_ranks):
        assert changes == pytest.approx(expected, rel=1e-6)
