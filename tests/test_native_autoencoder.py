"""The native autoencoder against diffusers' AutoencoderKL, and what breaks the parity when it is planted."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from native import assert_same, edited, record, runner
from network_autoencoder import PLAIN, VARIANTS, draw, latents, pictures, reference, widths
from parity import error, pair, pairs_of
from safetensors.torch import load_file, save_file

from sglang_gen import env
from sglang_gen.backends.native import components
from sglang_gen.errors import UserError
from sglang_gen.families import autoencoder, registry
from sglang_gen.families.contract import Request
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.models.vae import posterior
from sglang_gen.types import Component, Size
from sglang_gen.weights.load import load


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(diffusers' network, ours) of a configuration and a dtype."""
    return pairs_of(reference, autoencoder, tmp_path_factory)


@torch.no_grad()
def moments(our, their, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and log variances, ours and theirs."""
    return our.quant_conv(our.encoder(given)), their.encode(given).latent_dist.parameters


@torch.no_grad()
def decoded(our, their, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return our.decode(given), their.decode(given, return_dict=False)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_autoencoder_computes_what_diffusers_computes(pairs, variant, dtype, tolerance):
    config = VARIANTS[variant]
    their, our = pairs(config, dtype)
    assert error(*moments(our, their, pictures(config, dtype, 3, 32, 48))) <= tolerance
    assert error(*decoded(our, their, latents(config, dtype, 3, 6, 4))) <= tolerance
    assert our.config.factor == 2 ** (len(config["block_out_channels"]) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_rounds_as_diffusers_does_with_channels_first_and_last(pairs, dtype, batch, layout):
    """A run that starts from a picture, whose channels are last in memory, starts from the same numbers."""
    their, our = pairs(PLAIN, dtype)
    given = pictures(PLAIN, dtype, batch, 44, 60).contiguous(memory_format=layout)
    assert torch.equal(*moments(our, their, given))
    assert torch.equal(*decoded(our, their, latents(PLAIN, dtype, batch, 6, 4)))


@pytest.mark.parametrize("size", [(7, 12), (9, 5), (1, 3), (11, 11)])
def test_sizes_that_are_odd_or_do_not_halve_evenly_are_the_same(pairs, size):
    their, our = pairs(PLAIN, torch.float64)
    assert error(*decoded(our, their, latents(PLAIN, torch.float64, 2, *size))) <= 1e-10
    given = pictures(PLAIN, torch.float64, 2, 3 * size[0] + 4, 3 * size[1] + 4)
    assert error(*moments(our, their, given)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drawn_latent_is_bit_identical(dtype):
    """Of the same moments, those whose variance is held at its limits among them."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    given = (40 * draw(3, 8, 5, 7)).to(dtype)
    ours = posterior(given).sample(torch.Generator().manual_seed(3))
    theirs = DiagonalGaussianDistribution(given).sample(torch.Generator().manual_seed(3))
    assert torch.equal(ours, theirs)
    assert torch.isfinite(ours).all()


def old_layout(weights: dict[str, torch.Tensor], pixels: bool) -> dict[str, torch.Tensor]:
    """Attention under the names of old checkpoints, as convolutions of one pixel where that is wanted."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, tensor in weights.items():
        for new, old in names.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, old)
                tensor = tensor[..., None, None].clone() if pixels and tensor.ndim == 2 else tensor
        found[name] = tensor
    return found


@pytest.mark.parametrize("pixels", [False, True])
def test_attention_under_the_names_of_old_checkpoints_is_the_same(pixels):
    their, _ = pair(reference(**PLAIN), autoencoder, Path("vae"), torch.float64)
    (file,) = in_folder(Path("vae"))
    weights = old_layout(load_file(file), pixels)
    assert sum("proj_attn" in name for name in weights) == 4
    save_file(weights, file)
    component = Component("diffusers", "AutoencoderKL", Path("vae"), dict(their.config))
    our = components._autoencoder(component, torch.float64, "cpu")
    assert error(*moments(our, their, pictures(PLAIN, torch.float64, 1, 16, 24))) <= 1e-10
    assert error(*decoded(our, their, latents(PLAIN, torch.float64, 1, 4, 6))) <= 1e-10


def silence(attention) -> None:
    attention.to_out.weight.zero_(), attention.to_out.bias.zero_()


IN_THE_DECODER = {
    "attention is silent": lambda net: silence(net.middle.attention),
    "a bias is doubled": lambda net: net.up[1].residuals[0].conv_1.bias.mul_(2),
    "a norm is flat": lambda net: net.up[2].residuals[1].norm_2.weight.fill_(1),
    "the norm of attention is flat": lambda net: net.middle.attention.norm.weight.fill_(1),
    "the last norm is flat": lambda net: net.norm_out.weight.fill_(1),
    "an upsample's bias is gone": lambda net: net.up[0].upsample.conv.bias.zero_(),
    "a shortcut is silent": lambda net: net.up[1].residuals[0].shortcut.weight.zero_(),
    "queries and keys are swapped": lambda net: net.middle.attention.to_qkv.weight.copy_(
        net.middle.attention.to_qkv.weight.unflatten(0, (3, -1))[[1, 0, 2]].flatten(0, 1)
    ),
}
IN_THE_ENCODER = {
    "attention is silent": lambda net: silence(net.middle.attention),
    "a downsample's bias is gone": lambda net: net.down[1].downsample.conv.bias.zero_(),
    "a norm is flat": lambda net: net.down[0].residuals[1].norm_1.weight.fill_(1),
    "a shortcut is silent": lambda net: net.down[2].residuals[0].shortcut.weight.zero_(),
}


DEFECTS = [("decoder", name) for name in IN_THE_DECODER] + [("encoder", name) for name in IN_THE_ENCODER]


@pytest.mark.parametrize(("half", "name"), DEFECTS)
def test_a_planted_defect_breaks_the_parity(pairs, half, name):
    their, our = pairs(PLAIN, torch.float32)
    broken = copy.deepcopy(our)
    with torch.no_grad():
        {"decoder": IN_THE_DECODER, "encoder": IN_THE_ENCODER}[half][name](getattr(broken, half))
    if half == "decoder":
        assert error(*decoded(broken, their, latents(PLAIN, torch.float32, 2, 8, 6))) > 1e-3
    else:
        assert error(*moments(broken, their, pictures(PLAIN, torch.float32, 2, 24, 32))) > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(pairs):
    _, our = pairs(PLAIN, torch.float64)
    given = latents(PLAIN, torch.float64, 3, 5, 6)
    with torch.no_grad():
        assert error(our.decode(given)[1:2], our.decode(given[1:2])) <= 1e-10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda w: w.pop("decoder.mid_block.attentions.0.to_v.weight"),
            "is not a checkpoint of this Autoencoder: it lacks decoder.mid_block.attentions.0.to_v.weight",
        ),
        (lambda w: w.update(extra=torch.zeros(1)), "it holds extra, which Autoencoder does not have"),
        (
            lambda w: w.update({"decoder.conv_out.bias": torch.zeros(4)}),
            "decoder.conv_out.bias has the shape [4], this network needs [3]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_the_tensor(change, sentence):
    reference(**PLAIN).save_pretrained("vae")
    (file,) = in_folder(Path("vae"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(UserError) as failure:
        load(partial(autoencoder.build, PLAIN), [file], autoencoder.sources, torch.float32, "cpu")
    assert sentence in str(failure.value)


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sdxl", "sd35_large", "flux_dev"])
def test_the_published_autoencoder_has_the_published_tensors(preset):
    config = json.loads((env.preset_configs(preset) / "vae" / "config.json").read_text())
    with torch.device("meta"):
        our, their = autoencoder.build(config), AutoencoderKL.from_config(config)
    names = [source for name in our.state_dict() for source in autoencoder.sources(name)]
    assert sorted(names) == sorted(their.state_dict())
    assert sum(p.numel() for p in our.parameters()) == sum(p.numel() for p in their.parameters())


def test_what_a_config_leaves_out_is_what_diffusers_takes():
    with torch.device("meta"):
        their = AutoencoderKL()
    assert {name: their.config[name] for name in autoencoder.DEFAULTS} == dict(autoencoder.DEFAULTS)


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


ODD = [
    ({"act_fn": "gelu"}, "its vae does not support act_fn=gelu"),
    ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
     "its vae does not support up_block_types=['UpDecoderBlock2D', 'AttnUpDecoderBlock2D']"),
    ({"latents_mean": "none"}, "its vae does not support latents_mean=none"),
    ({"invented_in": 2030}, "its vae does not support invented_in=2030"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), ODD, ids=lambda value: str(value)[:30])
def test_an_autoencoder_that_asks_for_more_is_refused_by_the_name_of_what_it_asks(pipelines, run, changes, reason):
    model = edited(pipelines["sdxl"], "model", "vae/config.json", **changes)
    done = run(model, "--backend", "sglang")
    assert done.code == 2
    assert f"The native engine cannot run this: {reason}; run with --backend" in done.lines[-1]
    planned = run(model, "dry_run=true")
    assert (planned.code, reason in planned.out + planned.err) == (0, True)


def test_an_autoencoder_of_another_architecture_runs_on_diffusers_with_the_reason(run):
    config = widths(8, 16) | {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}
    reference(**config).save_pretrained("attentive")
    done = run("sdxl", "--component-paths", '{"vae": "attentive"}', steps=1)
    assert done.code == 0, done.err
    why = "its vae does not support down_block_types=['DownEncoderBlock2D', 'AttnDownEncoderBlock2D']"
    assert f"INFO: Backend: diffusers (the native engine cannot run this: {why})" in done.lines
    assert record("outputs")["effective"]["components"]["vae"] == "AutoencoderKL"


MEAN, DEVIATION = {"latents_mean": [-1.6, 1.1, 0.2, -0.4]}, {"latents_std": [8.4, 5.1, 5.2, 5.9]}


@pytest.mark.whole
@pytest.mark.parametrize("part", [{}, MEAN | DEVIATION, MEAN, DEVIATION], ids=["none", "both", "mean", "deviation"])
def test_latents_are_scaled_as_in_diffusers(pipelines, run, part):
    model = edited(pipelines["sdxl"], "model", "vae/config.json", **part)
    for backend in ("sglang", "diffusers"):
        done = run(model, "--guidance-scale", "3", "--backend", backend, folder=backend)
        assert done.code == 0, done.err
    assert_same("sglang", "diffusers", 1)
    assert record("sglang")["effective"]["components"]["vae"] == "Autoencoder"


@pytest.mark.parametrize(
    ("half", "force", "dtype"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),  # has the range of float32
        (torch.bfloat16, False, torch.bfloat16),
    ],
)
def test_an_autoencoder_in_float16_decodes_in_float32_where_its_config_says_so(
    pipelines, half, force, dtype, monkeypatch
):
    """Numbers as diffusers' class gives them in the dtype that its pipeline would choose."""
    folder = edited(pipelines["sdxl"], "model", "vae/config.json", force_upcast=force) / "vae"
    config = json.loads((folder / "config.json").read_text())
    our = load(partial(autoencoder.build, config), in_folder(folder), autoencoder.sources, half, "cpu")
    seen, given = [], latents(config, half, 1, 4, 6)
    forward = type(our.decoder).forward
    monkeypatch.setattr(type(our.decoder), "forward", lambda self, x: (seen.append(x.dtype), forward(self, x))[1])
    with torch.no_grad():
        found = registry.pipeline(registry.by_name("sdxl")).decode(
            our, given, Request(Size(48, 32), 8, steps=1, guidance=1.0)
        )
    their = AutoencoderKL.from_pretrained(folder, dtype=half).to(dtype)
    with torch.no_grad():
        wanted = their.decode(given.to(dtype) / config["scaling_factor"], return_dict=False)[0]
    assert (seen, found.dtype, autoencoder.dtype(our)) == ([dtype], dtype, half)
    wanted = wanted.movedim(1, -1)[:, None]  # one frame, channels last
    assert error(found.float(), wanted.float()) <= (1e-5 if dtype is torch.float32 else 1e-2)
