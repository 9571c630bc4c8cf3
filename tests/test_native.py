"""The native engine as a user meets it: which backend a run takes, and the same picture from both."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from native import assert_both_make_the_same, assert_same, edited, picture, record, runner

from sglang_gen.backends.native import engine
from sglang_gen.models.flux import Flux
from sglang_gen.models.sd3 import SD3
from sglang_gen.models.unet import UNet


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl", "sd15"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(
            ("--negative-prompt", "a dog", "--num-samples", "3", "sampling.batch_size=2"), marks=pytest.mark.whole
        ),
        pytest.param(("--guidance-scale", "1.0"), marks=pytest.mark.whole),
        pytest.param(("--negative-prompt", "", "sampling.max_sequence_length=16"), marks=pytest.mark.whole),
    ],
)
def test_both_backends_make_the_same_picture(run, name, words):
    if name in ("sdxl", "sd15"):
        words = tuple(word for word in words if "max_sequence_length" not in word)  # their encoders take one length
    assert_both_make_the_same(run, name, *words)


@pytest.mark.whole
@pytest.mark.parametrize("zeros", [True, False])
def test_no_negative_prompt_is_not_an_empty_one_where_the_model_says_so(pipelines, run, zeros):
    model = edited(pipelines["sdxl"], "model", "model_index.json", force_zeros_for_empty_prompt=zeros)
    assert_both_make_the_same(run, model)
    absent = picture("sglang/generated_image_0.png")
    assert run(model, "--negative-prompt", "", "--guidance-scale", "3", folder="empty").code == 0
    assert np.array_equal(picture("empty/generated_image_0.png"), absent) is not zeros


@pytest.mark.whole
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True}),
        ("unet/config.json", {"sample_size": 20}),
    ],
)
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_what_the_pipeline_mends_in_old_configurations_is_mended(pipelines, run, file, changes):
    model = edited(pipelines["sd15"], "model", file, **changes)
    if "_class_name" in changes:
        model = edited(model, "other", "model_index.json", scheduler=["diffusers", changes["_class_name"]])
    assert_both_make_the_same(run, model)


@pytest.mark.whole
def test_a_rescaled_guidance_is_the_same(run):
    assert_both_make_the_same(run, "sdxl", "--diffusers-kwargs", '{"guidance_rescale": 0.7}')
    rescaled = picture("sglang/generated_image_0.png")
    assert run("sdxl", "--guidance-scale", "3", folder="plain").code == 0
    assert not np.array_equal(picture("plain/generated_image_0.png"), rescaled)


@pytest.mark.whole
def test_latents_that_do_not_halve_evenly_make_the_same_picture(run):
    assert_both_make_the_same(run, "sdxl", size=(40, 56))
    assert_both_make_the_same(run, "sd15", size=(40, 72))


def test_a_scale_that_is_no_number_is_refused(run):
    done = run("sdxl", "--diffusers-kwargs", '{"guidance_rescale": "much"}', "--backend", "sglang")
    assert done.code == 2
    assert done.lines[-1] == "ERROR: --diffusers-kwargs: 'guidance_rescale' is 'much'; it must be a number"


@pytest.mark.parametrize(
    ("name", "file", "changes", "reason"),
    [
        (
            "sdxl",
            "unet/config.json",
            {"class_embed_type": "timestep"},
            "its unet does not support class_embed_type=timestep",
        ),
        (
            "sdxl",
            "unet/config.json",
            {"addition_embed_type": None},
            "its unet does not support addition_embed_type=None",
        ),
        ("sd15", "unet/config.json", {"time_cond_proj_dim": 256}, "its unet does not support time_cond_proj_dim=256"),
        ("sd15", "unet/config.json", {"mid_block_type": None}, "its unet does not support mid_block_type=None"),
        (
            "sd15",
            "text_encoder/config.json",
            {"use_attention_mask": True},
            "it does not support a text encoder that masks the padding of prompts (use_attention_mask)",
        ),
        ("sd15", "unet/config.json", {"invented_in": 2030}, "its unet does not support invented_in=2030"),
        (
            "sd3",
            "transformer/config.json",
            {"qk_norm": "layer_norm"},
            "its transformer does not support qk_norm=layer_norm",
        ),
        ("flux", "transformer/config.json", {"patch_size": 2}, "its transformer does not support patch_size=2"),
        (
            "sd15",
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderTiny"]},
            "its vae has the class AutoencoderTiny in place of AutoencoderKL",
        ),
    ],
)
def test_a_model_that_asks_for_more_is_refused_by_the_name_of_what_it_asks(pipelines, run, name, file, changes, reason):
    model = edited(pipelines[name], "model", file, **changes)
    done = run(model, "--backend", "sglang")
    assert (done.code, done.lines[-1]) == (
        2,
        f"ERROR: The native engine cannot run this: {reason}; run with --backend diffusers or auto",
    )
    planned = run(model, "dry_run=true")
    assert planned.code == 0, planned.err
    assert reason in planned.out + planned.err


@pytest.mark.whole
def test_true_guidance_of_flux_needs_its_scale_and_a_negative_prompt(run):
    words = ("--diffusers-kwargs", '{"true_cfg_scale": 3.0}', "--negative-prompt", "a dog")
    for backend in ("sglang", "diffusers"):
        assert run("flux", *words, "--backend", backend, folder=backend).code == 0
    assert_same("sglang", "diffusers", 1)
    assert run("flux", folder="plain").code == 0
    assert not np.array_equal(picture("plain/generated_image_0.png"), picture("sglang/generated_image_0.png"))


def test_auto_takes_the_native_engine_where_it_can(run):
    done = run("sd3")
    assert done.code == 0, done.err
    assert record("outputs")["requested"]["backend"] == "auto"
    assert record("outputs")["effective"]["backend"] == "sglang"
    assert not [line for line in done.lines if line.startswith("INFO: Backend: ")]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        (
            "sd15",
            ("--pipeline-class-name", "StableDiffusionPAGPipeline"),
            "it has no StableDiffusionPAGPipeline (it has StableDiffusion3Pipeline, FluxPipeline, StableDiffusionXL",
        ),
        (
            "sd3",
            ("--diffusers-kwargs", '{"clip_skip": 1}'),
            "'clip_skip' of --diffusers-kwargs is an argument",
        ),
    ],
)
def test_auto_says_why_it_takes_diffusers_and_sglang_refuses(run, name, words, reason):
    done = run(name, *words, steps=2)
    assert done.code == 0, done.err
    notice = f"INFO: Backend: diffusers (the native engine cannot run this: {reason}"
    assert any(line.startswith(notice) for line in done.lines), done.err
    assert record("outputs")["effective"]["backend"] == "diffusers"
    refused = run(name, *words, "--backend", "sglang")
    assert refused.code == 2
    assert f"ERROR: The native engine cannot run this: {reason}" in refused.err


@pytest.mark.parametrize(
    ("name", "network", "words", "times"),
    [
        ("sd3", SD3, (), 1),
        ("flux", Flux, (), 1),
        ("sdxl", UNet, (), 1),
        ("sdxl", UNet, ("sampling.guidance_batching=sequential",), 2),  # branches that take turns
        ("sd15", UNet, ("sampling.guidance_interval=[0,0.5]",), 2),  # with and without guidance the rows are others
    ],
)
def test_what_is_the_same_for_all_steps_is_computed_once(run, monkeypatch, name, network, words, times):
    calls = []
    condition = network.condition

    def counted(*args, **kwargs):
        if args[2].device.type != "meta":  # there shapes are found out, and nothing is computed
            calls.append(1)
        return condition(*args, **kwargs)

    monkeypatch.setattr(network, "condition", counted)
    assert run(name, *words, steps=5).code == 0
    assert len(calls) == times


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "sd15", "sdxl", "flux"])
def test_a_second_generation_in_the_process_is_bit_identical(run, name):
    done = run(name, "perf.repeat=3", "--num-samples", "2")
    assert done.code == 0, done.err
    assert "WARNING" not in done.err


@pytest.mark.parametrize("what", ["frames", "latents"])
def test_a_second_generation_that_differs_by_a_bit_is_a_warning(run, monkeypatch, what):
    decode, sample, times = engine.NativeEngine._decode, engine.NativeEngine._sample, []

    def decoded(self, latents, request, batch):
        frames = decode(self, latents, request, batch)
        times.append(batch)
        frames[0, 0, 0, 0] ^= what == "frames" and len(times) == 4  # the second batch of the second time
        return frames

    def sampled(self, batch, steps, clock):
        found = sample(self, batch, steps, clock)
        if what == "latents" and len(times) == 4:
            found.latents.view(-1)[0].nextafter_(torch.tensor(9.0))
        return found

    monkeypatch.setattr(engine.NativeEngine, "_decode", decoded)
    monkeypatch.setattr(engine.NativeEngine, "_sample", sampled)
    done = run("sd3", "perf.repeat=2", "--num-samples", "2")
    assert done.code == 0, done.err
    assert [line for line in done.lines if "WARNING" in line] == [
        "WARNING: Sample 1 differs when it is generated again in this process"
    ]


def test_a_prompt_that_the_encoder_cuts_is_a_warning(run):
    done = run("sd3", "sampling.max_sequence_length=4")
    assert done.code == 0, done.err
    (line,) = [line for line in done.lines if line.startswith("WARNING: T5EncoderModel takes 4 tokens")]
    assert line.endswith('does not see: "cat"')  # the last of the four is the end of the text


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_the_work_of_the_native_network_is_counted(run, name):
    assert run(name, "--perf-dump-path", "ours.json", "--backend", "sglang", folder="ours").code == 0
    assert run(name, "--perf-dump-path", "theirs.json", "--backend", "diffusers", folder="theirs").code == 0
    ours, theirs = (json.loads(Path(f"{name}.json").read_text())["work"]["denoising"] for name in ("ours", "theirs"))
    assert 0.8 * theirs["flops"] < ours["flops"] < theirs["flops"]  # what all steps share is counted once


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_noise_of_an_earlier_run_is_taken_by_either_backend(run, name):
    scale = ("--guidance-scale", "3")  # a higher one makes more than 1e-5 of the tiny SDXL's own rounding
    assert run(name, *scale, folder="first").code == 0
    noise = "sampling.latents=first/generated_image_0.safetensors"
    for backend in ("sglang", "diffusers"):
        done = run(name, noise, *scale, "--backend", backend, folder=backend)
        assert done.code == 0, done.err
        assert_same(backend, "first", 1)
