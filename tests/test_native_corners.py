"""Models and requests that are unusual, natively: the picture of diffusers, or one sentence."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from native import COMMON, assert_both_make_the_same, assert_same, edited, picture, record, runner, with_scheduler
from on_meta import on_meta
from reference import Reference
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from whole import plan_of

from sglang_gen import env
from sglang_gen.backends.native.build import build
from sglang_gen.families import text_encoding, unet_shared
from sglang_gen.families.flux import pipeline as flux
from sglang_gen.families.sd3 import pipeline as sd3
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.types import Layout


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_model_that_says_no_size_needs_one(pipelines, run, name):
    model = edited(pipelines[name], "model", "unet/config.json", sample_size=None)
    assert_both_make_the_same(run, model)
    for words in ((), ("dry_run=true",), ("parallel=sp2",)):
        done = run(model, *words, "--backend", "sglang", size=None)
        assert (done.code, done.lines[-1]) == (
            2,
            "ERROR: The model's configuration has no default image size; give --height and --width",
        )


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_of_one_side_alone_the_other_is_the_models_own(pipelines, run, name):
    network = "transformer" if name == "sd3" else "unet"
    own = json.loads((pipelines[name] / network / "config.json").read_text())["sample_size"]
    for backend in ("sglang", "diffusers"):
        done = run(name, "--height", 48, "--backend", backend, folder=backend, size=None, steps=1)
        assert done.code == 0, done.err
        assert picture(f"{backend}/generated_image_0.png").shape == (48, own * 2, 3)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_a_learned_word_of_several_vectors_is_all_of_them(pipelines, sglang, name):
    pipeline = DiffusionPipeline.from_pretrained(pipelines[name], dtype=torch.float32)
    numbers = torch.Generator().manual_seed(3)
    for which in ("", "_2") if name == "sdxl" else ("",):
        encoder, tokenizer = (getattr(pipeline, f"{part}{which}") for part in ("text_encoder", "tokenizer"))
        vectors = torch.randn(3, encoder.config.hidden_size, generator=numbers)
        pipeline.load_textual_inversion(vectors, token="<toy>", text_encoder=encoder, tokenizer=tokenizer)
    assert text_encoding.expanded(pipeline.tokenizer, ["a <toy>, red", "a toy"]) == [
        "a <toy> <toy>_1 <toy>_2, red",
        "a toy",
    ]
    pipeline.save_pretrained("model")
    for backend in ("sglang", "diffusers"):
        done = sglang("generate", "--model-path", "./model", "--prompt", "a <toy>", *COMMON, "--height", 32,
                      "--width", 32, "--num-inference-steps", 2, "--dtype", "float32", "--guidance-scale", 2,
                      "--backend", backend, "--output-path", backend)  # fmt: skip
        assert done.code == 0, done.err
    assert_same("sglang", "diffusers", 1)


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_variant_beside_the_weights_does_not_say_in_which_dtype_they_are_stored(pipelines, sglang, backend):
    shutil.copytree(pipelines["sdxl"], "model")
    weights = load_file("model/unet/diffusion_pytorch_model.safetensors")
    half = {key: value.half() for key, value in weights.items()}
    save_file(half, "model/unet/diffusion_pytorch_model.fp16.safetensors")
    done = sglang("generate", "--model-path", "./model", "--prompt", "a cat", *COMMON, "--height", 32, "--width", 32,
                  "--num-inference-steps", 1, "--disable-autocast", "--backend", backend)  # fmt: skip
    assert done.code == 0, done.err
    assert record("outputs")["effective"]["dtype"] == "float32"


def test_the_files_of_a_component_are_those_of_no_variant():
    for name in ("m.fp16.safetensors.index.json", "m.safetensors.index.json"):
        Path(name).write_text(json.dumps({"weight_map": {"a": name.replace(".index.json", "")}}))
    assert in_folder(Path()) == [Path("m.safetensors")]


def test_an_index_stands_before_the_single_file_beside_it_as_its_library_has_it():
    """diffusers prefers the index, transformers the single file."""
    for folder, stem, config in (("network", "diffusion_pytorch_model", {"_class_name": "UNet2DConditionModel"}),
                                 ("encoder", "model", {"architectures": ["CLIPTextModel"]})):  # fmt: skip
        place = Path(folder)
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        (place / f"{stem}.safetensors").touch()
        shards = [f"{stem}-{number}-of-2.safetensors" for number in (1, 2)]
        index = {"weight_map": {"b": shards[1], "a": shards[0], "c": shards[1]}}
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in in_folder(Path("network"))] == [
        "diffusion_pytorch_model-1-of-2.safetensors", "diffusion_pytorch_model-2-of-2.safetensors"
    ]  # fmt: skip
    assert [path.name for path in in_folder(Path("encoder"))] == ["model.safetensors"]


@pytest.mark.whole
def test_schnell_takes_no_guidance_and_says_so(run):
    model = tiny.flux(Path("schnell"), guidance_embeds=False)
    assert_both_make_the_same(run, model, "--guidance-scale", "7.5")
    for backend in ("sglang", "diffusers"):
        done = run(model, "--guidance-scale", "4", "--backend", backend, folder=backend)
        assert "WARNING: --guidance-scale has no effect: this model takes no guidance as an input" in done.err
    assert "no effect" not in run("flux", "--guidance-scale", "4").err


@pytest.mark.parametrize(
    ("name", "words", "argument"),
    [("flux", (), "true_cfg_scale"), ("sdxl", ("--guidance-scale", "1"), "guidance_rescale")],
)
def test_arguments_of_guidance_that_is_not_there_are_warned_of(run, name, words, argument):
    done = run(name, *words, "--diffusers-kwargs", json.dumps({argument: 4}), "--backend", "sglang")
    assert done.code == 0, done.err
    assert f"WARNING: --diffusers-kwargs: {argument} has no effect: there is no guidance" in done.err


@pytest.mark.parametrize(
    ("name", "scheduler", "settings", "sentence"),
    [
        ("sd3", "DDIMScheduler", {}, "DDIMScheduler does not integrate a flow (it has no use_flow_sigmas)"),
        ("flux", "EulerDiscreteScheduler", {}, "EulerDiscreteScheduler does not integrate a flow"),
        ("flux", "UniPCMultistepScheduler",
         {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "odd"},
         "UniPCMultistepScheduler refuses 3 steps: "),
    ],
)  # fmt: skip
def test_a_scheduler_that_cannot_sample_a_flow_is_refused_in_one_sentence(
    pipelines, run, name, scheduler, settings, sentence
):
    model = with_scheduler(pipelines[name], scheduler, **settings)
    done = run(str(model.resolve()), "--backend", "sglang")
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


@pytest.mark.whole
@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_of_higher_order_integrate_a_flow_as_in_diffusers(pipelines, run, scheduler):
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    assert_both_make_the_same(run, with_scheduler(pipelines["sd3"], scheduler, **settings), steps=4)


@pytest.mark.whole
def test_dynamic_shifting_of_sd3_is_that_of_diffusers(pipelines, run):
    file = "scheduler/scheduler_config.json"
    assert_both_make_the_same(run, edited(pipelines["sd3"], "model", file, use_dynamic_shifting=True))


PUBLISHED = {"sd3_medium": (sd3, SD3Transformer2DModel), "sd35_medium": (sd3, SD3Transformer2DModel),
             "sd35_large": (sd3, SD3Transformer2DModel), "flux_dev": (flux, FluxTransformer2DModel),
             "flux_schnell": (flux, FluxTransformer2DModel)}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_transformer_has_the_published_tensors(preset):
    glue, kind = PUBLISHED[preset]
    config = json.loads((env.preset_configs(preset) / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        ours, theirs = glue.build(config), kind.from_config(config)
    names = [source for name in ours.state_dict() for source in glue.sources(name)]
    assert sorted(names) == sorted(theirs.state_dict())
    assert sum(each.numel() for each in ours.parameters()) == sum(each.numel() for each in theirs.parameters())


@pytest.mark.parametrize(("dtype", "last"), [(torch.bfloat16, True), (torch.float32, False)])
def test_convolutions_of_half_precision_have_their_channels_last(pipelines, dtype, last):
    words = (f"model.path={pipelines['sd15']}", "sampling.prompt=a", f"dtype={str(dtype).removeprefix('torch.')}")
    network = build(plan_of(*words), Mesh()).network
    weights = [module.weight for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    wide = [weight for weight in weights if weight.shape[1] > 1 and weight.shape[2] > 1]
    assert wide
    assert all(weight.is_contiguous(memory_format=torch.channels_last) is last for weight in wide)


def test_a_sparse_kernel_is_for_the_picture_and_not_for_its_text():
    """Where a picture has as many tokens as its text, their number does not tell them apart."""
    split = Split(Mesh(Layout()), {}, unet_shared.SHARDING)
    placed = on_meta(split, partial(unet_shared.build, Reference("sdxl").variants["sdxl"]), torch.float32)

    def sparse(q, k, v):
        return scaled_dot_product_attention(q, k, v)

    placed.set_kernel(sparse, None, scaled_dot_product_attention)
    blocks = [block for level in placed.network.levels() for each in level.transformers for block in each.blocks]
    assert blocks
    assert all(block.self_attention.attend.kernel is sparse for block in blocks)
    assert all(block.cross_attention.attend.kernel is scaled_dot_product_attention for block in blocks)


@pytest.mark.slow
def test_in_bfloat16_the_embedded_model_draws_the_same_picture_on_either_backend(sglang):
    words = ("--prompt", "A serene landscape with mountains and a lake at sunset", "--seed", 42, "--dtype", "bfloat16")
    for backend in ("sglang", "diffusers"):
        assert sglang("generate", *words, "--backend", backend, "--output-path", backend).code == 0
    ours, theirs = (picture(f"{backend}/generated_image_0.png") for backend in ("sglang", "diffusers"))
    assert 10 * np.log10(255**2 / max(np.mean((ours - theirs) ** 2), 1e-9)) >= 50
