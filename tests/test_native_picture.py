"""Image to image on the native engine: the latents and pictures of diffusers' own pipelines."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from cases import mostly_slow, mostly_whole
from diffusers import AutoencoderKL
from native import assert_both_make_the_same, edited, error, picture, record, runner, tensors, with_scheduler
from PIL import Image

from sglang_gen.families import registry

NAMES = ["sd15", "sdxl", "sd3", "flux"]
PIPELINES = {
    "sd15": diffusers.StableDiffusionImg2ImgPipeline, "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline, "flux": diffusers.FluxImg2ImgPipeline,
}  # fmt: skip
DEFAULTS = {"sd15": 0.8, "sdxl": 0.3, "sd3": 0.6, "flux": 0.6}


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.fixture
def photo() -> str:
    """A picture with structure, 44 pixels high and 61 wide: gradients with a bright square."""
    rows, columns = np.linspace(0, 200, 44), np.linspace(30, 255, 61)
    pixels = np.stack([rows[:, None] + 0 * columns, columns + 0 * rows[:, None], rows[:, None] * columns / 255], -1)
    pixels[8:20, 24:40] = (250, 240, 30)
    Image.fromarray(pixels.astype(np.uint8)).save("photo.png")
    return "photo.png"


def strength(value: float, **others: object) -> tuple[str, str]:
    return "--diffusers-kwargs", json.dumps({"strength": value, **others})


@pytest.mark.parametrize("name", mostly_whole(NAMES, "sd15", "flux"))
@pytest.mark.parametrize("value", mostly_slow([0.3, 0.75, 1.0], 0.75))
def test_both_backends_make_the_same_of_a_picture(run, photo, name, value):
    size = (24, 40) if name in ("sd3", "flux") else None
    assert_both_make_the_same(run, name, "--image-path", photo, *strength(value), steps=5, size=size)
    height_width = [record("sglang")["effective"][side] for side in ("height", "width")]
    assert height_width == ([24, 40] if size else [44, 60])  # 61 is no multiple of 2


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_a_strength_spares_as_many_steps_as_in_diffusers(name):
    """Parts of a step are dropped or run, by the family."""
    scheduler = SimpleNamespace(order=1, timesteps=torch.arange(40))
    counting = SimpleNamespace(scheduler=scheduler)
    family = registry.pipeline(registry.by_name(name.removesuffix("15")))
    for steps in (1, 3, 5, 7, 28):
        for value in (0.0, 0.1, 0.3, 0.5, 0.6, 0.75, 0.99, 1.0):
            _, run = PIPELINES[name].get_timesteps(counting, steps, value, "cpu")
            assert family.skipped(steps, value) == steps - run, (steps, value)


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_of_a_batch_is_the_one_that_diffusers_makes_alone(pipelines, run, photo, name):
    words = ("--image-path", photo, *strength(0.6), "--guidance-scale", "3", "--negative-prompt", "a dog")
    size = (24, 40) if name in ("sd3", "flux") else None
    done = run(name, *words, "--num-samples", "3", "sampling.batch_size=3", "--backend", "sglang", steps=5, size=size)
    assert done.code == 0, done.err
    pipeline = diffusers.AutoPipelineForImage2Image.from_pretrained(pipelines[name], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    given = {"negative_prompt": "a dog"} | ({"height": 24, "width": 40} if size else {})
    for number in range(3):
        expected = pipeline("a cat", image=Image.open(photo).convert("RGB"), strength=0.6, num_inference_steps=5,
                            guidance_scale=3.0, generator=torch.Generator("cpu").manual_seed(7 + number),
                            output_type="latent", **given).images  # fmt: skip
        assert error(tensors("outputs", number)["latents"][None], expected.numpy()) <= 1e-5
    assert error(tensors("outputs", 0)["noise"], tensors("outputs", 1)["noise"]) > 0.1


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_a_strength_that_nobody_gives_is_that_of_the_pipeline(run, photo, name):
    assert run(name, "--image-path", photo, *strength(DEFAULTS[name]), folder="given", steps=6).code == 0
    assert run(name, "--image-path", photo, folder="left", steps=6).code == 0
    assert np.array_equal(tensors("given")["latents"], tensors("left")["latents"])


@pytest.mark.whole
@pytest.mark.parametrize(("name", "steps_run"), [("sd15", 7), ("sdxl", 7), ("sd3", 8), ("flux", 8)])
@pytest.mark.parametrize("backend", mostly_slow(["sglang", "diffusers"], "sglang"))
def test_progress_and_dump_count_the_steps_that_are_run(run, photo, name, steps_run, backend):
    words = ("--image-path", photo, *strength(0.75), "--backend", backend, "--perf-dump-path", "perf.json")
    done = run(name, *words, steps=10)
    assert done.code == 0, done.err
    assert f"INFO: Progress: 100% [{steps_run}/{steps_run} steps]" in done.lines
    dump = json.loads(Path("perf.json").read_text())
    assert len(dump["denoise_steps_ms"]) == steps_run
    assert backend == "diffusers" or dump["work"]["latents"]["flops"] > 0  # of encoding the picture


@pytest.mark.slow
def test_an_autoencoder_that_is_at_work_in_float32_is_counted_in_it(run, photo):
    words = ("--image-path", photo, *strength(0.5), "--backend", "sglang", "--perf-dump-path", "perf.json")
    done = run("sdxl", *words, dtype="float16")
    assert done.code == 0, done.err
    work = json.loads(Path("perf.json").read_text())["work"]
    assert (work["latents"]["flops"] > 0, work["decoding"]["flops"] > 0) == (True, True)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "scheduler", "settings"),
    mostly_slow(
        [
            ("sdxl", "EulerAncestralDiscreteScheduler", {}),
            ("sd15", "HeunDiscreteScheduler", {}),
            ("sdxl", "HeunDiscreteScheduler", {}),
            ("sdxl", "PNDMScheduler", {"skip_prk_steps": True}),
            ("sd15", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
            ("sdxl", "LCMScheduler", {}),
        ],
        ("sdxl", "EulerAncestralDiscreteScheduler", {}),
        ("sd15", "HeunDiscreteScheduler", {}),
        ("sd15", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ),
)
def test_schedulers_start_in_the_middle_as_they_do_in_diffusers(pipelines, run, photo, name, scheduler, settings):
    model = with_scheduler(pipelines[name], scheduler, steps_offset=1, **settings)
    words = ("--image-path", photo, *strength(0.5), "--num-samples", "2", "sampling.batch_size=2")
    assert_both_make_the_same(run, str(model), *words, steps=8, size=None)
    assert record("sglang")["effective"]["components"]["scheduler"] == scheduler


@pytest.mark.whole
def test_a_flow_that_draws_noise_in_each_step_starts_in_the_middle_too(pipelines, run, photo):
    model = edited(pipelines["sd3"], "model", "scheduler/scheduler_config.json", stochastic_sampling=True)
    done = run(str(model), "--image-path", photo, "--num-samples", "2", "sampling.batch_size=2", folder="both")
    assert done.code == 0, done.err
    assert run(str(model), "--image-path", photo, "--num-samples", "2", folder="single").code == 0
    for number in range(2):
        assert error(tensors("both", number)["latents"], tensors("single", number)["latents"]) <= 1e-5


def with_vae(folder: Path, **settings: object) -> Path:
    """A copy whose autoencoder has other settings, its latents' mean and deviation among them."""
    copied = shutil.copytree(folder, Path("model"))
    vae = AutoencoderKL.from_pretrained(copied / "vae")
    vae.register_to_config(**settings)
    vae.save_config(copied / "vae")
    return copied


@pytest.mark.whole
def test_mean_and_deviation_of_the_latents_of_sdxl_are_used_both_ways(pipelines, run, photo):
    moments = {"latents_mean": [-1.6, 1.1, 0.2, -0.4], "latents_std": [8.4, 5.1, 5.2, 5.9]}
    model = with_vae(pipelines["sdxl"], **moments)
    assert_both_make_the_same(run, str(model), "--image-path", photo, *strength(0.5), steps=4, size=None)
    assert run("sdxl", "--image-path", photo, *strength(0.5), folder="plain", steps=4).code == 0
    assert error(tensors("sglang")["noise"], tensors("plain")["noise"]) > 0.01


@pytest.mark.whole
@pytest.mark.parametrize("force", [True, False])
def test_an_autoencoder_that_must_be_in_float32_encodes_in_it(pipelines, run, photo, force):
    """The same start on both backends to the bit, in bfloat16."""
    model = with_vae(pipelines["sdxl"], force_upcast=force)
    for backend in ("sglang", "diffusers"):
        words = ("--image-path", photo, "--backend", backend)
        done = run(str(model), *words, folder=backend, steps=4, size=None, dtype="bfloat16")
        assert done.code == 0, done.err
    assert np.array_equal(tensors("sglang")["noise"], tensors("diffusers")["noise"])


@pytest.mark.whole
def test_the_size_of_a_unet_is_the_pictures_and_of_a_flow_the_requests(run, photo):
    done = run("sdxl", "--image-path", photo, size=(32, 32), steps=4)
    assert "WARNING: sampling.height has no effect: StableDiffusionXLPipeline keeps the size of the input image" in (
        done.lines
    )
    assert picture("outputs/generated_image_0.png").shape == (44, 60, 3)
    done = run("sd3", "--image-path", photo, size=(32, 32), steps=4)
    assert "has no effect" not in done.err
    assert picture("outputs/generated_image_1.png").shape == (32, 32, 3)


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_warmup_does_all_of_its_steps(run, photo, backend):
    words = ("--warmup", "compile.warmup_steps=2", "--backend", backend)
    done = run("sdxl", "--image-path", photo, *words, steps=4, size=None)
    assert done.code == 0, done.err
    progress = [line for line in done.lines if line.startswith("INFO: Progress: 100%")]
    assert progress == ["INFO: Progress: 100% [2/2 steps]", "INFO: Progress: 100% [1/1 steps]"]


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("sdxl", strength(1.5), "--diffusers-kwargs: 'strength' is 1.5; it must lie between 0 and 1"),
        ("sd15", strength(True), "--diffusers-kwargs: 'strength' is True; it must lie between 0 and 1"),
        ("flux", strength("much"), "--diffusers-kwargs: 'strength' is 'much'; it must lie between 0 and 1"),
        ("sd15", strength(0.2), "A strength of 0.2 leaves none of 4 steps; raise --num-inference-steps, or the"),
        ("sd3", strength(0), "A strength of 0 leaves none of 4 steps"),
        ("sd15", ("--image-path", "dot.png"), "the image is 1 x 5 pixels; this model takes 2 x 2 or more"),
        (
            "sd15",
            strength(0.5, mask_image="photo.png"),
            "'mask_image' of --diffusers-kwargs is an argument of the diffusers",
        ),
    ],
)
def test_a_picture_or_strength_that_cannot_be_is_one_sentence(run, photo, name, words, sentence):
    Image.new("RGB", (1, 5)).save("dot.png")
    image = () if "--image-path" in words else ("--image-path", photo)
    done = run(name, *image, *words, "--backend", "sglang", steps=4)
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


def test_a_scheduler_that_puts_no_noise_on_a_picture_is_one_sentence(pipelines, run, photo):
    model = with_scheduler(pipelines["sd3"], "UniPCMultistepScheduler", prediction_type="flow_prediction",
                           use_flow_sigmas=True)  # fmt: skip
    done = run(str(model), "--image-path", photo, "--backend", "sglang")
    sentence = "UniPCMultistepScheduler cannot add noise to an image, so it cannot start from one"
    assert (done.code, done.lines[-1]) == (2, f"ERROR: {sentence}")


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_picture_and_loaded_latents_exclude_each_other(run, photo, backend):
    assert run("sdxl", "--image-path", photo, *strength(0.5), folder="first", steps=4).code == 0
    words = ("--image-path", photo, "sampling.latents=first/generated_image_0.safetensors", "--backend", backend)
    done = run("sdxl", *words, steps=4)
    sentence = "sampling.latents and sampling.image_path exclude each other"
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


def test_a_strength_without_a_picture_is_refused_on_every_backend(run):
    for backend in ("sglang", "auto"):
        done = run("sd15", *strength(0.5), "--backend", backend)
        assert (done.code, "'strength'" in done.lines[-1]) == (2, True)


def test_a_mask_runs_on_diffusers_with_its_reason(run, photo):
    Image.new("L", (61, 44), 255).save("mask.png")
    done = run("sd15", "--image-path", photo, *strength(0.9, mask_image="mask.png"))
    assert done.code == 0, done.err
    reason = "'mask_image' of --diffusers-kwargs is an argument of the diffusers pipeline"
    assert f"INFO: Backend: diffusers (the native engine cannot run this: {reason})" in done.lines
