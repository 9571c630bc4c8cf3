"""The arithmetic of parallelism in one process: whose part of a layer, of tokens and of rows is whose, and merging."""

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.engine.attention_kernels import kernel_with_lse
from sglang_gen.models.layers import Shard, cut_sections
from sglang_gen.parallel.collectives import Axis, Traffic, all_reduce, counted, finish_gather_along
from sglang_gen.parallel.sequence import Lengths, merged
from sglang_gen.parallel.sequence_boundary import shard, shard_sizes
from sglang_gen.weights.load import _read


def ranges(widths: list[int], rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
    return cut_sections({str(index): width for index, width in enumerate(widths)}, rank, ranks)[1]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3))
def test_ranks_share_out_every_channel_of_every_section_once(sections, ranks, times):
    """Section s of a layer stands at its own place, in proportion to its width, and rank r has its r-th part."""
    unit = times * ranks
    found = [ranges([unit * section for section in sections], rank, ranks) for rank in range(ranks)]
    start = 0
    for number, section in enumerate(sections):
        held = [range(*each[number]) for each in found]
        assert [channel for each in held for channel in each] == list(range(start, start + section * unit))
        assert {len(each) for each in held} == {section * times}
        start += section * unit


def test_the_wide_section_of_a_layer_may_stand_first():
    assert [ranges([4, 2], rank, 2) for rank in range(2)] == [((0, 2), (4, 5)), ((2, 4), (5, 6))]


class Checkpoint:
    def __init__(self, **tensors: torch.Tensor) -> None:
        self.take = tensors.__getitem__


@pytest.mark.parametrize("index", [0, 1])
def test_a_rank_reads_its_part_of_every_tensor_that_is_joined(index):
    """Query, key, value and a feed-forward of four times the width stand one below the other."""
    pieces = {name: torch.arange(width)[:, None] + start for name, width, start in
              (("q", 4, 100), ("k", 4, 200), ("v", 4, 300), ("ff", 16, 400))}  # fmt: skip
    slot = Shard(0, ranges([4, 4, 4, 16], index, 2), 28)
    rows = _read(Checkpoint(**pieces), list(pieces), slot)
    expected = [piece.chunk(2)[index] for piece in pieces.values()]
    assert torch.equal(torch.cat([row for (row,) in rows]), torch.cat(expected))


def test_a_rank_reads_its_part_of_both_sections_of_a_layers_inputs():
    weight = torch.arange(20.0).view(2, 10)
    slot = Shard(1, ranges([2, 8], 1, 2), 10)
    (pieces,) = _read(Checkpoint(w=weight), ["w"], slot)
    assert torch.equal(torch.cat(pieces, dim=1), weight[:, [1, 6, 7, 8, 9]])


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_ranks_share_out_rows_as_equally_as_units_allow(units, unit, ranks, left_over):
    size = units * unit + min(left_over, unit - 1)
    lengths = shard_sizes(size, unit, ranks)
    assert sum(lengths) == size
    assert len(lengths) == ranks
    assert all(length % unit == 0 for length in lengths[:-1])
    whole = [length // unit for length in lengths]
    assert max(whole) - min(whole) <= 1
    assert whole == sorted(whole, reverse=True)
    rows = torch.arange(size)[None]
    assert torch.equal(torch.cat([shard(rows, 1, lengths, rank) for rank in range(ranks)], dim=1), rows)


def test_what_was_padded_to_travel_is_cut_off_where_it_arrives():
    found = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [0.0], [0.0]]])  # [ranks, longest, ...]
    assert finish_gather_along(found, 1, [3, 1]).tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_groups_of_ulysses_are_neighbours_and_ring_goes_from_group_to_group():
    lengths = Lengths(ring=2, ulysses=3, tokens=(5, 4, 4, 3, 3, 2))
    assert [lengths.of_group(ring) for ring in range(2)] == [(5, 4, 4), (3, 3, 2)]
    assert lengths.of_groups() == (13, 8)


@pytest.mark.parametrize("lengths", [(4, 4), (7, 1), (1, 2, 5)])
def test_attention_to_some_keys_after_the_other_merges_to_attention_to_all(lengths):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64, generator=generator)
    kernel = kernel_with_lse("math", "cpu", torch.float64)
    found = None
    for keys, values in zip(k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True):
        each = kernel(q, 3 * keys, values)  # sharp, so that the parts weigh differently
        found = each if found is None else merged(found, each)
    assert found is not None
    assert torch.allclose(found[0], scaled_dot_product_attention(q, 3 * k, v), rtol=0, atol=1e-12)
    assert torch.allclose(found[1], (3 * q @ k.mT / math.sqrt(8)).logsumexp(-1), rtol=0, atol=1e-12)


def test_what_another_thread_sends_is_counted_by_that_thread_alone():
    """A trace on meta beside a generation is not traffic of the generation, and neither counts for the other."""
    x, axis = torch.empty(8, device="meta"), Axis("tp", 2, 0)

    def trace(found: list[Traffic]) -> None:
        all_reduce(x, axis)  # nobody counts in this thread yet
        with counted() as traffic:
            all_reduce(x, axis)
        found.append(traffic)

    found: list[Traffic] = []
    with counted() as outer, counted() as inner:
        all_reduce(x, axis)
        thread = threading.Thread(target=trace, args=(found,))
        thread.start()
        thread.join()
    with pytest.raises(RuntimeError), counted():
        raise RuntimeError
    all_reduce(x, axis)
    assert [traffic.calls for traffic in (outer, inner, *found)] == [{"all_reduce tp": 1}] * 3


def test_traffic_of_repeated_evaluations_is_that_of_one_as_often():
    total, one = Traffic(), Traffic({"all_reduce tp": 2, "all_gather sp": 1}, {"all_reduce tp": 64, "all_gather sp": 8})
    total.include(one, 3)
    total.include(Traffic({"all_reduce tp": 1}, {"all_reduce tp": 5}))
    assert total == Traffic({"all_reduce tp": 7, "all_gather sp": 3}, {"all_reduce tp": 197, "all_gather sp": 24})
