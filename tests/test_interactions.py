"""Interactions in the report of a sweep: pairs of settings that together are worse than their sum."""

from itertools import product
from pathlib import Path

import pytest

from sglang_gen.perf.quality import decibels, squared_error_of
from sglang_gen.report.cell_metrics import Metrics
from sglang_gen.report.cells import Cell
from sglang_gen.report.interactions import interactions, sentences
from sglang_gen.report.job_reader import Row

KEYS = {"cache": ("none", "dbcache"), "dtype": ("float32", "bfloat16"), "parallel": ("single", "cfg2")}


def grid(errors: dict[tuple[str, ...], tuple[float, ...]]) -> list[Metrics]:
    """The cells of a sweep by the settings that differ from the first cell; others have the sum of their parts."""
    found = []
    for values in product(*KEYS.values()):
        changed = tuple(value for value, (first, _) in zip(values, KEYS.values(), strict=True) if value != first)
        cell = Cell(Path(), Row("0", "completed"), dict(zip(KEYS, values, strict=True)), "", "")
        alone = [errors[(value,)] for value in changed]
        own = errors.get(changed, tuple(map(sum, zip(*alone, strict=True))) if alone else (0.0,) * 4)
        found.append(Metrics(cell, None, None, None, None, errors=own))
    return found


ALONE = {("dbcache",): (10.0, 12.0, 8.0, 10.0), ("bfloat16",): (4.0, 5.0, 3.0, 4.0), ("cfg2",): (0.0, 0.0, 0.0, 0.0)}


def test_errors_that_add_up_are_no_interaction():
    assert interactions(grid(ALONE)) == []


def test_a_pair_that_is_worse_than_its_sum_is_named_with_both_in_decibels():
    (pair,) = interactions(grid({**ALONE, ("dbcache", "bfloat16"): (30.0, 33.0, 27.0, 30.0)}))
    assert (pair.settings, pair.error, pair.summed) == (("cache=dbcache", "dtype=bfloat16"), 30.0, 14.0)
    assert sentences([pair]) == [
        f"Together worse than their sum: cache=dbcache with dtype=bfloat16 has {decibels(30):.1f} dB, where the errors "
        f"of each alone add up to {decibels(14):.1f} dB."
    ]


def test_a_layout_that_is_exact_alone_and_not_together_is_named():
    (pair,) = interactions(grid({**ALONE, ("dbcache", "cfg2"): (20.0, 22.0, 18.0, 20.0)}))
    assert pair.settings == ("cache=dbcache", "parallel=cfg2")


@pytest.mark.parametrize(
    "both",
    [
        (14.5, 17.5, 11.5, 14.5),  # 4 % more
        (60.0, 17.0, 11.0, 14.0),  # one image alone
        (10.0, 12.0, 8.0, 10.0),  # better than the sum
    ],
)
def test_an_excess_that_is_small_or_uncertain_is_not_named(both):
    assert interactions(grid({**ALONE, ("dbcache", "bfloat16"): both})) == []


def test_rounding_is_not_an_interaction():
    rounding = dict.fromkeys(ALONE, (0.001,) * 4)
    assert interactions(grid({**rounding, ("bfloat16", "cfg2"): (0.01,) * 4})) == []


def test_cells_without_images_or_with_a_missing_partner_are_left_out():
    cells = grid({**ALONE, ("dbcache", "bfloat16"): (30.0, 33.0, 27.0, 30.0)})
    alone = {"cache": "none", "dtype": "bfloat16", "parallel": "single"}
    assert interactions([one for one in cells if one.cell.values != alone]) == []
    assert interactions([Metrics(one.cell, None, None, None, None) for one in cells]) == []


def test_the_largest_pairs_come_first_and_the_rest_is_counted():
    worse = {("dbcache", "bfloat16"): (31.0,) * 4, ("dbcache", "cfg2"): (60.0,) * 4, ("bfloat16", "cfg2"): (20.0,) * 4}
    pairs = interactions(grid({**ALONE, **worse}))
    assert [pair.error for pair in pairs] == [60.0, 31.0, 20.0]
    (sentence,) = sentences(pairs, most=2)
    assert sentence.endswith(" So is 1 more pair.")


def test_a_psnr_gives_back_its_squared_error():
    assert squared_error_of(decibels(7.25)) == pytest.approx(7.25)
