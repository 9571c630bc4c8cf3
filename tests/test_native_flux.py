"""The native FLUX network against diffusers' class, and what breaks the parity when it is planted."""

import copy

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from parity import error, pairs_of
from reference import Reference

from sglang_gen.families.flux import pipeline

FLUX = Reference("flux")
VARIANTS, TIMESTEPS = FLUX.variants, FLUX.timesteps
inputs, ours, theirs, reference = FLUX.inputs, FLUX.ours, FLUX.theirs, FLUX.network
DEV = FLUX.variants["dev"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(diffusers' network, ours) of a configuration and a dtype."""
    return pairs_of(reference, pipeline, tmp_path_factory)


@pytest.fixture
def exact(monkeypatch):
    """diffusers turns queries and keys in float32 whatever their dtype; here in their own."""

    def rotate(x, table, sequence_dim):
        assert sequence_dim == 1
        cosines, sines = (part[None, :, None, :].to(x.dtype) for part in table)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cosines + torch.stack([-imaginary, real], -1).flatten(-2) * sines

    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rotate)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_computes_what_diffusers_computes(pairs, variant):
    their, our = pairs(VARIANTS[variant], torch.float32)
    given = inputs(VARIANTS[variant], torch.float32)
    for step in range(len(TIMESTEPS)):
        assert error(ours(our, *given, step=step), theirs(their, *given, step=step)) <= 1e-5


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_double_precision_nothing_but_rounding_is_left(pairs, variant):
    their, our = pairs(VARIANTS[variant], torch.float64)
    given = inputs(VARIANTS[variant], torch.float64)
    for step in range(len(TIMESTEPS)):
        assert error(ours(our, *given, step=step), theirs(their, *given, step=step)) <= 1e-10


def swap_heads(qkv: torch.Tensor, width: int = 16) -> None:
    qkv[: 2 * width] = qkv[: 2 * width].roll(width, 0)


MUTATIONS = {
    "an attention is silent": lambda net: net.blocks[1].image.to_out.weight.zero_(),
    "text values are silent": lambda net: net.blocks[1].text.to_qkv.weight[64:].zero_(),
    "a bias is doubled": lambda net: net.blocks[0].text.ff.up.bias.mul_(2),
    "two heads are swapped": lambda net: swap_heads(net.single_blocks[0].to_qkv_ff.weight),
    "a norm is flat": lambda net: net.single_blocks[1].norms.norm_k.weight.fill_(1),
    "the guidance is not embedded": lambda net: net.guidance_embedder.linear_2.weight.zero_(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_defect_breaks_the_parity(pairs, mutation):
    their, our = pairs(DEV, torch.float32)
    given = inputs(DEV, torch.float32)
    broken = copy.deepcopy(our)
    with torch.no_grad():
        MUTATIONS[mutation](broken)
    assert error(ours(broken, *given, step=0), theirs(their, *given, step=0)) > 1e-3


def test_prompt_guidance_and_position_matter(pairs):
    _, our = pairs(DEV, torch.float32)
    latents, text, pooled = inputs(DEV, torch.float32)
    first = ours(our, latents, text, pooled, step=0)
    assert error(ours(our, latents, text.flip(0), pooled, step=0), first) > 1e-3
    assert error(ours(our, latents, text, pooled.flip(0), step=0), first) > 1e-3
    assert error(ours(our, latents, text, pooled, step=0, guidance=7.0), first) > 1e-3
    assert error(ours(our, latents.flip(1), text, pooled, step=0).flip(1), first) > 1e-3
