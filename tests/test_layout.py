"""Degrees of parallelism: one equation, and what follows from what was stated."""

import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_gen import env
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.schema import Parallel
from sglang_gen.errors import UserError
from sglang_gen.hub import resolve
from sglang_gen.plan import degrees, layout_limits
from sglang_gen.types import Layout

DEGREES = ("num_gpus", "tp_size", "sp_degree", "ulysses_degree", "ring_degree", "dp_size", "dp_degree")
SMALL = range(1, 17)  # no degree can be larger than the largest stated one


def infer(heads: int | None = None, **stated: int) -> Layout:
    return degrees.infer(Parallel(**stated), set(stated), heads)


def possible(stated: dict[str, int]) -> bool:
    """Is there an assignment that satisfies the equation and all that was stated?

    What was not stated is free, except that nobody is given tensor or data parallelism unasked: dp_size is free only
    where a dp_degree and the ranks are stated.
    """
    tp, cfg = stated.get("tp_size", 1), 2 if stated.get("enable_cfg_parallel") else 1
    free_dp = "dp_size" not in stated and {"num_gpus", "dp_degree"} <= stated.keys()
    for dp, ring, ulysses in product(SMALL if free_dp else (stated.get("dp_size", 1),), SMALL, SMALL):
        ranks = dp * cfg * ring * ulysses * tp
        found = {"num_gpus": ranks, "sp_degree": ring * ulysses, "ulysses_degree": ulysses, "ring_degree": ring,
                 "dp_degree": ranks // dp}  # fmt: skip
        if all(stated.get(name, value) == value for name, value in found.items()):
            return True
    return False


@pytest.mark.whole
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    stated=st.dictionaries(st.sampled_from(DEGREES), st.sampled_from([1, 2, 3, 4, 6, 8, 16]), max_size=5),
    cfg=st.booleans(),
    heads=st.sampled_from([None, 1, 10, 24]),
)
def test_degrees_are_accepted_exactly_where_the_equation_can_hold(stated, cfg, heads):
    stated = {**stated, "enable_cfg_parallel": cfg}
    if not possible(stated):
        with pytest.raises(UserError, match="does not hold"):
            infer(heads, **stated)
    else:
        found = infer(heads, **stated)
        assert found.ranks == stated.get("num_gpus", found.ranks)
        assert found.ring * found.ulysses == stated.get("sp_degree", found.ring * found.ulysses)
        assert found.cfg == 1 + cfg


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Layout()),
        ({"num_gpus": 4}, Layout(ulysses=4)),
        ({"sp_degree": 4}, Layout(ulysses=4)),
        ({"tp_size": 4}, Layout(tp=4)),
        ({"num_gpus": 4, "sp_degree": 2, "tp_size": 2}, Layout(ulysses=2, tp=2)),
        ({"num_gpus": 4, "tp_size": 2}, Layout(ulysses=2, tp=2)),
        ({"num_gpus": 8, "ring_degree": 2}, Layout(ring=2, ulysses=4)),
        ({"num_gpus": 8, "ulysses_degree": 2}, Layout(ring=4, ulysses=2)),
        ({"ring_degree": 2, "ulysses_degree": 2}, Layout(ring=2, ulysses=2)),
        ({"num_gpus": 4, "enable_cfg_parallel": True}, Layout(cfg=2, ulysses=2)),
        ({"num_gpus": 4, "dp_size": 2}, Layout(dp=2, ulysses=2)),
        ({"num_gpus": 4, "dp_degree": 2}, Layout(dp=2, ulysses=2)),
        ({"dp_size": 2, "dp_degree": 2}, Layout(dp=2, ulysses=2)),
        ({"dp_size": 2, "tp_size": 2, "enable_cfg_parallel": True, "sp_degree": 2}, Layout(2, 2, 1, 2, 2)),
    ],
)
def test_what_is_not_given_follows(stated, expected):
    assert infer(**stated) == expected


@pytest.mark.parametrize(
    ("heads", "tp", "expected"), [(24, 1, (1, 4)), (10, 1, (2, 2)), (10, 2, (4, 1)), (7, 1, (4, 1))]
)
def test_ulysses_goes_as_far_as_the_heads_divide(heads, tp, expected):
    found = infer(heads, sp_degree=4, tp_size=tp)
    assert (found.ring, found.ulysses) == expected


def test_sdxl_on_sp2_tp2_is_ring_2_by_tp_2():
    card = resolve.read_card(env.preset_configs("sdxl"), "sdxl", weights=False)
    composed = compose(Choices(("model=sdxl", "parallel=sp2_tp2")))
    given_degrees = {"num_gpus", "sp_degree", "tp_size"}
    assert degrees.infer(composed.run.parallel, given_degrees, layout_limits.common_heads(card)) == Layout(ring=2, tp=2)


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"num_gpus": 0}, "parallel.num_gpus is 0; a degree is at least 1"),
        ({"tp_size": -2}, "parallel.tp_size is -2; a degree is at least 1"),
        ({"num_gpus": 3, "tp_size": 2}, f"{degrees.EQUATION} does not hold: "
         "dp_size 1, cfg 1, ring_degree 1, ulysses_degree 1, tp_size 2 make 2, num_gpus is 3"),
        ({"sp_degree": 4, "ring_degree": 3}, "sp_degree is 4, ring_degree 3"),
        ({"num_gpus": 4, "dp_size": 2, "dp_degree": 3}, "dp_degree = num_gpus / dp_size does not hold: dp_degree is 3"),
    ],
)  # fmt: skip
def test_the_error_prints_the_equation(stated, sentence):
    with pytest.raises(UserError) as error:
        infer(**stated)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("stated", "proposed"),
    [
        ({"num_gpus": 8, "sp_degree": 2, "tp_size": 2},
         "parallel.num_gpus=4 or parallel.dp_size=2 or parallel.tp_size=4"),
        ({"num_gpus": 3, "tp_size": 2}, "parallel.tp_size=3 or parallel.num_gpus=2"),
        ({"num_gpus": 1, "enable_cfg_parallel": True}, "parallel.num_gpus=2"),
        ({"num_gpus": 4, "dp_size": 2, "dp_degree": 3}, "parallel.dp_degree=2"),
    ],
)  # fmt: skip
def test_the_error_says_which_number_to_change(stated, proposed):
    with pytest.raises(UserError) as error:
        infer(**stated)
    assert str(error.value).endswith(f"; take {proposed}")
    for change in proposed.split(" or "):
        name, _, value = change.removeprefix("parallel.").partition("=")
        infer(**{**stated, name: int(value)})


def test_where_no_single_number_mends_the_equation_the_error_says_so():
    with pytest.raises(UserError, match="num_gpus is 2; more than one of them has to change"):
        infer(num_gpus=2, sp_degree=2, ring_degree=2, ulysses_degree=2, dp_size=3)


def test_a_slip_of_the_pen_is_refused_at_once():
    """Degrees of a hundred thousand are answered as those of eight are."""
    started = time.monotonic()
    with pytest.raises(UserError, match=r"num_gpus is 4; take parallel\.sp_degree=4"):
        infer(10, sp_degree=100_000, num_gpus=4)
    found = layout_limits.Limits((10, 20), ((32, "group norms of {} groups"),), 32, "bands")
    with pytest.raises(UserError, match="take sp_degree 32"):
        layout_limits.check_network(found, Layout(ring=20_480), {"ring_degree"})
    assert time.monotonic() - started < 2
