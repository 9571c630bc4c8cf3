"""Decoding with some rows of the picture on each rank, beside one process."""

from pathlib import Path

import pytest
import torch
from cases import mostly_slow
from network_autoencoder import PLAIN, VARIANTS, draw, latents, reference
from parity import error, pair
from split import by_rows, decode
from torch import nn

from sglang_gen.families import autoencoder
from sglang_gen.models.layers import Conv2d, GroupNorm
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.spatial import RowDecoder, split_rows
from sglang_gen.types import Layout

LAYOUTS = {"ring2": Layout(ring=2), "ulysses3": Layout(ulysses=3), "usp4": Layout(ring=2, ulysses=2)}


@torch.no_grad()
def both(ranks, layout, config, given, mutation=None):
    """(pictures of one process, what the ranks answer)."""
    _, our = pair(reference(**config), autoencoder, Path("vae"), given.dtype)
    return our.decode(given), ranks.run(layout, decode, Path("vae").absolute(), config, given, mutation)


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "ulysses3"))
@pytest.mark.parametrize(
    "variant",
    ["with convolutions around the latents", "with a shift and without these convolutions", "without attention"],
)
def test_ranks_decode_the_pictures_of_one_process(ranks, variant, layout):
    config = VARIANTS[variant]
    expected, answers = both(ranks, LAYOUTS[layout], config, latents(config, torch.float64, 3, 7, 5))
    for pictures, sent, predicted in answers:
        assert error(pictures, expected) <= 1e-10
        assert torch.equal(pictures, answers[0][0])
        assert sent == predicted


DEFECTS = [
    "a convolution sees no neighbours", "a norm sees this rank's rows alone", "attention sees this rank's tokens alone",
]  # fmt: skip


@pytest.mark.parametrize("mutation", DEFECTS)
def test_a_defect_planted_in_the_split_decoder_breaks_the_parity(ranks, mutation):
    given = latents(PLAIN, torch.float64, 3, 7, 5)
    expected, answers = both(ranks, Layout(ulysses=3), PLAIN, given, mutation)
    assert error(answers[0][0], expected) > 1e-3


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 4), (3, 1), (2, 2)])
def test_few_rows_are_decoded_and_where_there_are_fewer_than_ranks_by_every_rank(ranks, size):
    expected, answers = both(ranks, Layout(ring=3), PLAIN, latents(PLAIN, torch.float64, 1, *size))
    for pictures, sent, predicted in answers:
        assert error(pictures, expected) <= 1e-10
        assert sent == predicted
        assert bool(sent.calls) == (size[0] >= 3)


def test_pictures_in_float32_and_bfloat16_are_those_of_one_process(ranks):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        expected, answers = both(ranks, Layout(ring=2), PLAIN, latents(PLAIN, dtype, 1, 6, 5))
        for pictures, *_ in answers:
            assert pictures.dtype == dtype
            assert error(pictures.float(), expected.float()) <= tolerance


LAYERS = {
    "a convolution": lambda: Conv2d(8, 4, 3, padding=1),
    "a convolution of every second row": lambda: Conv2d(8, 4, 3, padding=1, stride=2),
    "a group norm": lambda: GroupNorm(4, 8),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("rows", "last"), [((4, 4, 5), ()), ((2, 6, 1), ()), ((8, 2, 3), ()), ((4, 4, 5), (0, 1, 2)), ((2, 6, 1), (1,))]
)
def test_a_layer_over_uneven_rows_computes_what_it_computes_over_all(ranks, layer, rows, last):
    torch.manual_seed(0)
    whole, x = LAYERS[layer]().double(), 3 + draw(2, 8, sum(rows), 5)
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        expected = whole(x)
    answers = ranks.run(Layout(ring=3), by_rows, whole, x, rows, last)
    assert error(torch.cat(answers, dim=2), expected) <= 1e-12


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", range(3))
def test_a_split_layer_keeps_channels_where_they_are_in_memory(layer, rank, last):
    """Otherwise each convolution would convert its input, a crop of a map's rows too."""
    layout = torch.channels_last if last else torch.contiguous_format
    axis, whole = Axis("ring", 3, rank), LAYERS[layer]().to("meta", torch.bfloat16, memory_format=layout)
    split_rows(whole, axis)
    kept = []  # what the convolution is given, and what the norm gives
    if isinstance(whole, nn.Conv2d):
        whole.halo.register_forward_hook(lambda *args: kept.append(args[2]))
    else:
        whole.register_forward_hook(lambda *args: kept.append(args[2]))
    x = torch.empty(2, 8, 6, 5, device="meta", dtype=torch.bfloat16, memory_format=layout)
    for mine in (x, x[:, :, :4]):
        whole(mine)
        assert kept[-1].is_contiguous(memory_format=layout)
        assert not kept[-1].is_contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)
    assert len(kept) == 2


def test_a_norm_of_numbers_far_from_zero_keeps_their_variance_in_float32(ranks):
    """Merged moments are about each rank's own mean, which sums of squares are not."""
    norm, x = GroupNorm(2, 8).double(), 1e4 + draw(2, 8, 9, 5)
    with torch.no_grad():
        expected = norm(x)
    answers = ranks.run(Layout(ring=3), by_rows, norm.float(), x.float(), (3, 5, 1))
    assert error(torch.cat(answers, dim=2).double(), expected) <= 2e-3


def test_a_split_decoder_has_its_weights_once_in_every_dtype():
    decoder = autoencoder.build(PLAIN).decoder
    split = RowDecoder(decoder, Axis("sp", 2, 0))
    for dtype in (torch.float16, torch.float32):
        split.to(dtype)
        assert sum(weight.numel() for weight in split.parameters()) == sum(w.numel() for w in decoder.parameters())
        assert {weight.dtype for weight in split.decoder.parameters()} == {dtype}
