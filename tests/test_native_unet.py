"""The native UNet against diffusers' class, and what breaks the parity when it is planted."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from parity import compare, error, pairs_of
from reference import Reference
from safetensors.torch import load_file, save_file

from sglang_gen import env
from sglang_gen.errors import UserError
from sglang_gen.families import unet_shared
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.weights.load import load

UNET = Reference("sdxl")
VARIANTS, TIMESTEPS = Reference("sd").variants | UNET.variants, UNET.timesteps
inputs, ours, theirs, reference = UNET.inputs, UNET.ours, UNET.theirs, UNET.network
SD15, SDXL = VARIANTS["sd15"], VARIANTS["sdxl"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(diffusers' network, ours) of a configuration and a dtype."""
    return pairs_of(reference, unet_shared, tmp_path_factory)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_computes_what_diffusers_computes(pairs, variant):
    compare(pairs, VARIANTS[variant], inputs, ours, theirs, len(TIMESTEPS))


@pytest.mark.parametrize("size", [(7, 12), (9, 5), (11, 10), (4, 6)])
@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_sizes_that_do_not_halve_evenly_meet_again_on_the_way_up(pairs, variant, size):
    config = VARIANTS[variant]
    their, our = pairs(config, torch.float64)
    given = inputs(config, torch.float64, 2, *size)
    assert error(ours(our, *given, step=1), theirs(their, *given, step=1)) <= 1e-10


def test_fractions_of_timesteps_and_repeated_ones_are_taken(pairs):
    _, our = pairs(SD15, torch.float64)
    latents, text = inputs(SD15, torch.float64)
    with torch.no_grad():
        conditioning = our.condition(torch.tensor([500.0, 500.0, 500.5]), text)
        first, second, third = (our(latents, conditioning, step) for step in range(3))
    assert torch.equal(first, second)
    assert error(third, first) > 1e-6


def swap_heads(qkv: torch.Tensor, width: int = 8) -> None:
    qkv[: 2 * width] = qkv[: 2 * width].roll(width, 0)


MUTATIONS = {
    "an attention is silent": lambda net: net.down[1].transformers[0].blocks[1].self_attention.to_out.weight.zero_(),
    "the text is not read": lambda net: net.up[0].transformers[2].blocks[0].cross_attention.to_kv.weight.zero_(),
    "the middle is silent": lambda net: net.middle.transformers[0].project_out.weight.zero_(),
    "a bias is doubled": lambda net: net.up[1].residuals[0].conv_1.bias.mul_(2),
    "a gate's bias is doubled": lambda net: net.middle.transformers[0].blocks[1].ff.up.bias.mul_(2),
    "two heads are swapped": lambda net: swap_heads(net.down[2].transformers[0].blocks[0].self_attention.to_qkv.weight),
    "a norm is flat": lambda net: net.down[1].transformers[1].norm.weight.fill_(1),
    "a residual's norm is flat": lambda net: net.up[2].residuals[1].norm_2.weight.fill_(1),
    "a time projection is silent": lambda net: net.down[0].residuals[1].time.weight.zero_(),
    "pooled text and sizes are silent": lambda net: net.added_embedder.linear_2.weight.zero_(),
    "a shortcut is silent": lambda net: net.up[1].residuals[1].shortcut.weight.zero_(),
    "a sampler's bias is gone": lambda net: net.up[0].upsample.conv.bias.zero_(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_defect_breaks_the_parity(pairs, mutation):
    their, our = pairs(SDXL, torch.float32)
    given = inputs(SDXL, torch.float32)
    broken = copy.deepcopy(our)
    with torch.no_grad():
        MUTATIONS[mutation](broken)
    assert error(ours(broken, *given, step=0), theirs(their, *given, step=0)) > 1e-3


def test_another_prompt_size_and_timestep_give_another_output(pairs):
    _, our = pairs(SDXL, torch.float32)
    latents, text, pooled, sizes = inputs(SDXL, torch.float32)
    first = ours(our, latents, text, pooled, sizes, step=0)
    assert error(ours(our, latents, text.flip(0), pooled, sizes, step=0), first) > 1e-3
    assert error(ours(our, latents, text, pooled.flip(0), sizes, step=0), first) > 1e-3
    assert error(ours(our, latents, text, pooled, sizes.flip(0), step=0), first) > 1e-3
    assert error(ours(our, latents, text, pooled, sizes, step=1), first) > 1e-3


@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_rows_of_a_batch_do_not_see_each_other(pairs, variant):
    _, our = pairs(VARIANTS[variant], torch.float64)
    given = inputs(VARIANTS[variant], torch.float64)
    alone = ours(our, *(tensor[1:2] for tensor in given), step=0)
    assert error(ours(our, *given, step=0)[1:2], alone) <= 1e-10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda w: w.pop("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"),
            "it lacks down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        ),
        (lambda w: w.update(extra=torch.zeros(1)), "it holds extra, which UNet does not have"),
        (
            lambda w: w.update({"conv_out.bias": torch.zeros(3)}),
            "conv_out.bias has the shape [3], this network needs [4]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_the_tensor(change, sentence):
    reference(**SD15).save_pretrained("network")
    (file,) = in_folder(Path("network"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(UserError) as failure:
        load(lambda: unet_shared.build(SD15), [file], unet_shared.sources, torch.float32, "cpu")
    assert sentence in str(failure.value)


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sdxl"])
def test_the_published_network_has_the_published_tensors(preset):
    config = json.loads((env.preset_configs(preset) / "unet" / "config.json").read_text())
    with torch.device("meta"):
        our, their = unet_shared.build(config), UNet2DConditionModel.from_config(config)
    wanted = their.state_dict()
    names = [source for name in our.state_dict() for source in unet_shared.sources(name)]
    assert sorted(names) == sorted(wanted)
    assert sum(p.numel() for p in our.parameters()) == sum(p.numel() for p in their.parameters())
