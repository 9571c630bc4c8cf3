"""Every rank of every layout calls the same collectives in an order in which all of them complete.

Nothing runs: the ranks are traced on the meta device. With gloo a mistake of this kind is an error after minutes, with
NCCL it is a hang.
"""

import functools
import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import rehearsed
import torch
from cases import mostly_slow
from collective_order import Call, complete, recorded
from reference import Reference

from sglang_gen.dry_run.traces import trace_decoding
from sglang_gen.engine import attention_kernels
from sglang_gen.families.contract import Request
from sglang_gen.parallel import spatial
from sglang_gen.parallel.mesh import SEQUENCE, Mesh, coordinates
from sglang_gen.types import Component, Layout, Size

SIDES = (272, 192)  # pixels: 34 x 24 latents, of which no number of ranks has equal parts
TEXT = 7  # tokens of a text encoder
CONFIGS = {
    "sd3": Reference("sd3").variants["sd35-medium"] | {"num_attention_heads": 8, "attention_head_dim": 4},
    "flux": Reference("flux").variants["dev"]
    | {"num_attention_heads": 8, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)},
    "sdxl": Reference("sdxl").variants["sdxl"] | {"attention_head_dim": 8},
}
DECODER = {
    "block_out_channels": (8, 16), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
LAYOUTS = [
    Layout(*degrees)
    for degrees in itertools.product(range(1, 9), (1, 2), range(1, 9), range(1, 9), range(1, 9))
    if 1 < Layout(*degrees).ranks <= 8
]


def card(name: str):
    encoders = {"text_encoder": {"max_position_embeddings": TEXT}, "text_encoder_2": {"projection_dim": 20}}
    found = rehearsed.card_of(name, rehearsed.shallow(CONFIGS[name]), encoders)
    return replace(found, components={**found.components, "vae": Component("", "", None, DECODER)})


@functools.cache
def calls_of(name: str, layout: Layout, number: int) -> tuple[Call, ...]:
    """What one rank calls for a batch of two: conditioning, one guided step, and the decoder where it decodes."""
    with recorded() as calls:
        scale = 3.0 if layout.cfg > 1 else 1.0
        rehearsed.rank(name, card(name), layout, number, *SIDES, scale, rows=2, text_length=TEXT)
        mesh = Mesh(layout, number)
        if not (mesh.index("cfg") or mesh.index("tp")) and mesh.axis(SEQUENCE).size > 1:
            family = rehearsed.FAMILIES[name]
            request = Request(Size(*SIDES), rehearsed.FACTOR, steps=2, guidance=3.5, text_length=TEXT)
            trace_decoding(family, mesh.axis(SEQUENCE), card(name), request, 2, torch.float32, "cpu")
    return tuple(calls)


def called(name: str, layout: Layout) -> list[tuple[Call, ...]]:
    """What each rank calls; data parallel groups call the same."""
    one = replace(layout, dp=1)
    places = [coordinates(layout, rank) for rank in range(layout.ranks)]
    numbers = {tuple((coordinates(one, rank) | {"dp": 0}).items()): rank for rank in range(one.ranks)}
    return [calls_of(name, one, numbers[tuple((place | {"dp": 0}).items())]) for place in places]


def fits(name: str, layout: Layout) -> bool:
    """Whether every rank has a shard of the network."""
    try:
        return bool(called(name, layout))
    except (AssertionError, RuntimeError):
        return False


def assert_completes(name: str, layout: Layout) -> None:
    completed = complete(layout, called(name, layout))
    assert completed > 0 or layout.dp == layout.ranks, layout


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "ranks"),
    mostly_slow(itertools.product(CONFIGS, range(2, 9)), ("sdxl", 2)),
)
def test_the_collectives_of_all_ranks_complete_in_every_layout(name, ranks):
    layouts = [layout for layout in LAYOUTS if layout.ranks == ranks and fits(name, layout)]
    assert {Layout(dp=ranks), Layout(ring=ranks)} <= set(layouts)
    for layout in layouts:
        assert_completes(name, layout)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "layout"),
    mostly_slow(
        itertools.product(CONFIGS, (Layout(ring=2, ulysses=2, tp=2), Layout(dp=2, cfg=2, ring=2))),
        ("flux", Layout(ring=2, ulysses=2, tp=2)),
        ("sdxl", Layout(dp=2, cfg=2, ring=2)),
    ),
)
def test_the_collectives_of_a_product_of_axes_complete(name, layout):
    assert fits(name, layout)
    assert_completes(name, layout)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_collectives_of_a_kernel_without_log_sum_exp_complete(name):
    """Ring then gathers keys and values."""
    layout = Layout(ring=2, ulysses=2)
    with patch.object(attention_kernels, "kernel_with_lse", lambda *_: None):
        lists = [calls_of.__wrapped__(name, layout, rank) for rank in range(layout.ranks)]
    assert all(any((call.kind, call.axis) == ("gather", "ring") for call in calls) for calls in lists)
    assert complete(layout, lists) > 0


# What would go wrong on real ranks fails here, with the ranks and the collective named


PAIR = Layout(ring=2)


@pytest.mark.whole
def test_a_rank_that_leaves_out_one_collective_is_found():
    lists = [list(calls_of("sd3", PAIR, rank)) for rank in range(2)]
    missing = lists[1].pop(3)
    assert missing.axis in ("ring", "sp")
    with pytest.raises(AssertionError, match=r"ring=2.* (call different|hangs|sends)"):
        complete(PAIR, lists)


@pytest.mark.whole
def test_a_rank_that_leaves_out_the_last_collective_leaves_the_other_waiting():
    lists = [list(calls_of("sd3", PAIR, rank)) for rank in range(2)]
    last = len(lists[1]) - 1
    lists[1].pop()
    with pytest.raises(
        AssertionError, match=rf"hangs: rank 0 waits in collective {last}, .*; rank 1 ended after {last}"
    ):
        complete(PAIR, lists)


@pytest.mark.whole
def test_a_halo_that_a_rank_with_nothing_to_receive_leaves_out_is_found(monkeypatch):
    """With a stride of two the first rank only sends: a shortcut that skips the exchange there hangs the others."""
    neighbours = spatial.neighbours

    def shortcut(x, axis, below):
        if not below and axis.index == 0:
            zeros = torch.zeros_like(x[:, :, :1])
            return zeros, zeros
        return neighbours(x, axis, below)

    monkeypatch.setattr(spatial, "neighbours", shortcut)
    lists = [calls_of.__wrapped__("sdxl", PAIR, rank) for rank in range(2)]
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] at their collectives .* call different ones: "):
        complete(PAIR, lists)


def call(kind: str, axis: str, *size: int) -> Call:
    return Call(kind, axis, size, torch.float32)


def test_groups_that_wait_for_each_other_in_a_circle_are_found():
    """Each group alone has the same order on all of its ranks."""
    tp, sp = call("all_reduce", "tp", 4), call("gather", "sp", 4)
    layout = Layout(ring=2, tp=2)
    assert complete(layout, [[tp, sp]] * 4) == 4
    with pytest.raises(AssertionError, match=r"hangs: rank 0 waits in collective 0, all_reduce tp .4. float32"):
        complete(layout, [[tp, sp], [sp, tp], [sp, tp], [tp, sp]])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (call("gather", "tp", 4), "call different ones: all_reduce tp .4. float32; gather tp .4. float32"),
        (call("all_reduce", "tp", 5), "call different sizes: all_reduce tp .4. float32; all_reduce tp .5. float32"),
        (Call("all_reduce", "tp", (4,), torch.bfloat16), "call different ones"),
    ],
)
def test_other_kinds_sizes_and_dtypes_are_found(other, message):
    with pytest.raises(AssertionError, match=message):
        complete(Layout(tp=2), [[call("all_reduce", "tp", 4)], [other]])


def test_an_exchange_of_which_one_rank_expects_another_size_is_found():
    one = Call("exchange", "ring", (6,), torch.float32, (2, 4), (2, 4))
    assert complete(PAIR, [[one], [Call("exchange", "ring", (6,), torch.float32, (4, 2), (4, 2))]]) == 1
    with pytest.raises(AssertionError, match="rank 0 sends 4 elements, of which rank 1 expects 3"):
        complete(PAIR, [[one], [Call("exchange", "ring", (6,), torch.float32, (4, 2), (3, 3))]])
    with pytest.raises(AssertionError, match="rank 0 sends other than it has"):
        complete(PAIR, [[replace(one, shape=(7,))], [one]])
