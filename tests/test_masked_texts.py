"""Texts of unequal length in one batch, whose padding is masked, beside each sample alone with its own text."""

from functools import cache

import masked
import pytest
import torch
from cases import mostly_slow
from parity import error

from sglang_gen.engine.cfg import Guidance
from sglang_gen.families import prediction
from sglang_gen.models.attention import SelfAttention
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Layout

LENGTHS = (9, 1, 4)  # tokens of each sample's text
TOKENS = 14  # of the image
LAYOUTS = {
    "tp2": Layout(tp=2), "ulysses2": Layout(ulysses=2), "ring2": Layout(ring=2), "ring3": Layout(ring=3),
    "usp4": Layout(ring=2, ulysses=2), "usp4 tp2": Layout(ring=2, ulysses=2, tp=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return masked.store(tmp_path_factory.mktemp("masked") / "network", masked.Masked(masked.Config()))


def padded(lengths, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts `[B, T, C]`, with numbers where there is no token, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(len(lengths), max(lengths), masked.Config().text_width, generator=generator, dtype=torch.float64)
    return 3 * text, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def drawn(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, TOKENS, masked.Config().channels, generator=generator, dtype=torch.float64)


@torch.no_grad()
def alone(folder, lengths=LENGTHS) -> torch.Tensor:
    """What one process computes of each sample with its own text, without a mask."""
    (text, _), latents = padded(lengths), drawn(len(lengths))
    samples = [
        masked.evaluate(Mesh(), folder, latents[row : row + 1], text[row : row + 1, :length], None)[0]
        for row, length in enumerate(lengths)
    ]
    return torch.cat(samples, dim=1)


@pytest.fixture(scope="module")
def expected(folder):
    return cache(lambda lengths: alone(folder, lengths))


KERNELS = {"sdpa": ("sdpa", True), "math": ("math", True), "without log-sum-exp": ("sdpa", False)}


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "math", "flash"])
def test_a_padded_batch_is_what_each_sample_is_alone(folder, expected, kernel):
    (text, mask), latents = padded(LENGTHS), drawn(len(LENGTHS))
    outputs, traffic, _ = masked.evaluate(Mesh(), folder, latents, text, mask, kernel)
    assert error(outputs, expected(LENGTHS)) <= 1e-10
    assert not traffic.calls
    unmasked, _, _ = masked.evaluate(Mesh(), folder, latents, text, None, kernel)
    assert error(unmasked, expected(LENGTHS)) > 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "tp2", "ulysses2", "ring2", "ring3", "usp4"))
def test_every_layout_computes_of_a_padded_batch_what_each_sample_is_alone(ranks, folder, expected, layout, kernel):
    """Of the text of one token all ranks but the first have padding only. What is sent is what was predicted."""
    (text, mask), latents = padded(LENGTHS), drawn(len(LENGTHS))
    for outputs, sent, predicted in ranks.run(
        LAYOUTS[layout], masked.evaluate, folder, latents, text, mask, *KERNELS[kernel]
    ):
        assert error(outputs, expected(LENGTHS)) <= 1e-10
        if kernel != "without log-sum-exp":
            assert sent == predicted


@pytest.mark.parametrize("layout", ["ring3", "usp4"])
def test_texts_shorter_than_the_ranks_leave_some_without_text(ranks, folder, expected, layout):
    (text, mask), latents = padded((2, 1)), drawn(2)
    for outputs, _, _ in ranks.run(LAYOUTS[layout], masked.evaluate, folder, latents, text, mask):
        assert error(outputs, expected((2, 1))) <= 1e-10


def test_a_mask_travels_in_the_exchanges_of_a_ring(ranks, folder):
    """One element for each token, in the dtype of the keys; Ulysses gathers one byte for each."""
    (text, mask), latents = padded(LENGTHS), drawn(len(LENGTHS))
    layers, rows, most = masked.Config().layers, len(LENGTHS), -(-TOKENS // 2) + -(-max(LENGTHS) // 2)
    for layout, collective, item in (("ring2", "all_to_all ring", 8), ("ulysses2", "all_gather ulysses", 1)):
        (_, with_mask, _), (_, without, _) = (
            ranks.run(LAYOUTS[layout], masked.evaluate, folder, latents, text, given)[0] for given in (mask, None)
        )
        more = with_mask.bytes[collective] - without.bytes.get(collective, 0)
        assert more == layers * rows * most * item
        extra = with_mask.calls[collective] - without.calls.get(collective, 0)
        assert extra == (layers if layout == "ulysses2" else 0)


MASKS = {
    "one rank": ((1, 1, 1, 0, 0, 0, 1, 1), (1, 0, 1, 1, 1, 1, 1, 0)),
    "the first two ranks": ((0, 0, 0, 0, 0, 0, 1, 1), (1, 1, 1, 1, 1, 1, 0, 0)),
    "all ranks": ((0, 0, 0, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ranks_of_a_ring_whose_keys_are_all_masked_count_for_nothing(ranks, mask, kernel, dtype):
    generator, seen = torch.Generator().manual_seed(0), torch.tensor(MASKS[mask], dtype=torch.bool)
    q, k, v = torch.randn(3, 2, 3, 8, 16, generator=generator, dtype=torch.float64).to(dtype)
    parts = ranks.run(Layout(ring=3), masked.ring, q, k, v, seen, (3, 3, 2), kernel)
    found = torch.cat(parts, dim=2)
    assert found.dtype == dtype
    wanted = masked.alone(q.double(), k.double(), v.double(), seen)
    assert (found.double() - wanted).abs().max() <= (1e-12 if dtype == torch.float64 else 2e-2)


def test_rows_that_gather_their_keys_early_gather_the_mask_too(ranks):
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2).double().requires_grad_(False), torch.randn(2, 8, 16, dtype=torch.float64)
    seen = torch.tensor(MASKS["the first two ranks"], dtype=torch.bool)
    found = torch.cat(ranks.run(Layout(ring=3), masked.rows, layer, x, seen, (3, 3, 2)), dim=1)
    assert error(found, layer(x, seen)) <= 1e-12
    for row, keys in enumerate(seen):
        own = layer(x[row : row + 1, keys])
        assert error(found[row : row + 1, keys], own) <= 1e-12


def branches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Negative prompts of at most 3 tokens and prompts of at most 9."""
    return [padded((3, 1, 2), seed=5), padded(LENGTHS)]


@torch.no_grad()
def test_branches_of_unequal_length_in_one_batch_predict_what_they_predict_in_turn(folder):
    latents = drawn(len(LENGTHS))
    batched, sequential = (
        masked.guide(Mesh(), folder, latents, branches(), Guidance(3.0, batched=together)) for together in (True, False)
    )
    assert error(batched, sequential) <= 1e-12
    other = masked.guide(Mesh(), folder, latents, branches()[::-1], Guidance(3.0))
    assert error(other, sequential) > 1e-2


@pytest.mark.parametrize("layout", [Layout(cfg=2), Layout(cfg=2, ring=2), Layout(ulysses=2)])
def test_ranks_of_guidance_have_each_the_length_of_its_own_branch(ranks, folder, layout):
    latents, guidance = drawn(len(LENGTHS)), Guidance(3.0)
    with torch.no_grad():
        wanted = masked.guide(Mesh(), folder, latents, branches(), Guidance(3.0, batched=False))
    answers = ranks.run(layout, masked.guide, folder, latents, branches(), guidance)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert error(answers[0], wanted) <= 1e-10


def test_joined_branches_are_padded_only_where_a_mask_follows():
    text, pooled = torch.ones(2, 3, 4), torch.ones(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    joined = prediction.joined([(text, mask, pooled), (text[:, :1], mask[:, :1], pooled)])
    assert [tuple(part.shape) for part in joined] == [(4, 3, 4), (4, 3), (4, 3)]
    assert joined[1].sum(dim=1).tolist() == [3, 3, 1, 1]
    assert joined[0].sum() == 2 * 3 * 4 + 2 * 4
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        prediction.joined([(text, pooled), (text[:, :1], pooled)])


def test_a_branch_without_text_attends_to_as_many_zeros_as_the_prompt_has_tokens():
    text, mask = padded(LENGTHS)
    zeros, kept = prediction.without_text((text, mask))
    assert not zeros.any()
    assert torch.equal(kept, mask)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["regional", "full"])
@pytest.mark.parametrize("layout", ["ring3", "ulysses2", "usp4"])
def test_compiled_blocks_take_the_mask_as_a_tensor(ranks, folder, layout, compiled):
    """Two lengths and a mask of other values take turns: a graph for each length, and none for other values."""
    latents, texts = drawn(len(LENGTHS)), [padded(LENGTHS), padded((6, 6, 2)), padded((9, 8, 7))]
    with torch.no_grad():
        wanted, _ = masked.in_turn(Mesh(), folder, latents, texts, "")
    for outputs, graphs in ranks.run(LAYOUTS[layout], masked.in_turn, folder, latents, texts, compiled):
        for output, each in zip(outputs, wanted, strict=True):
            assert error(output, each) <= 1e-10
        assert graphs == 2
