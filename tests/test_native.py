"""The native engine as a user meets it: which backend a run takes, and the same picture from both."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sglang_gen.models.sd3 import SD3

SIZE = ("--height", "32", "--width", "48", "--seed", "7", "--dtype", "float32", "output.latents=true")


@pytest.fixture
def run(pipelines, sglang):
    def generate(name: str, *words: object, folder: str = "outputs", steps: int = 3):
        return sglang("generate", "--model-path", pipelines[name], "--prompt", "a cat", *SIZE, "--output-path", folder,
                      "--num-inference-steps", steps, *words)  # fmt: skip

    return generate


def picture(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(folder: str, number: int = 0) -> dict:
    return json.loads(Path(f"{folder}/generated_image_{number}.json").read_text())


def assert_same(ours: str, theirs: str, count: int) -> None:
    """Noise exactly, latents to 1e-5 relative, pictures to one level."""
    for number in range(count):
        a, b = (load_file(f"{folder}/generated_image_{number}.safetensors") for folder in (ours, theirs))
        assert np.array_equal(a["noise"], b["noise"])
        assert np.abs(a["latents"] - b["latents"]).max() <= 1e-5 * np.abs(b["latents"]).max()
        a, b = (picture(f"{folder}/generated_image_{number}.png") for folder in (ours, theirs))
        assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--negative-prompt", "a dog", "--num-samples", "3", "sampling.batch_size=2"),
        ("--guidance-scale", "1.0"),
        ("--negative-prompt", "", "sampling.max_sequence_length=16"),
    ],
)
def test_both_backends_make_the_same_picture(run, name, words):
    assert run(name, *words, "--backend", "sglang", folder="ours").code == 0
    done = run(name, *words, "--backend", "diffusers", folder="theirs")
    assert done.code == 0, done.err
    assert record("ours")["effective"]["backend"] == "sglang"
    assert record("theirs")["effective"]["backend"] == "diffusers"
    assert_same("ours", "theirs", len(list(Path("theirs").glob("*.png"))))


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


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("sdxl", (), "it has no StableDiffusionXLPipeline"),
        ("sd3", ("cache=dbcache", "cache.Fn_compute_blocks=1"), "it has no step cache yet"),
        ("sd3", ("--vae-cpu-offload",), "it does not offload yet"),
        (
            "sd3",
            ("--diffusers-kwargs", '{"clip_skip": 1}'),
            "'clip_skip' of --diffusers-kwargs is for",
        ),
        ("sd3", ("--attention-backend", "math"), "sdpa is its only attention kernel yet"),
    ],
)
def test_auto_says_why_it_takes_diffusers_and_sglang_refuses(run, name, words, reason):
    done = run(name, *words, steps=2)
    assert done.code == 0, done.err
    assert [line for line in done.lines if line.startswith(f"INFO: Backend: diffusers ({reason}")], done.err
    assert record("outputs")["effective"]["backend"] == "diffusers"
    refused = run(name, *words, "--backend", "sglang")
    assert refused.code == 2
    assert f"ERROR: The native engine cannot run this: {reason}" in refused.err


def test_what_is_the_same_for_all_steps_is_computed_once(run, monkeypatch):
    calls = []
    condition = SD3.condition

    def counted(*args, **kwargs):
        calls.append(1)
        return condition(*args, **kwargs)

    monkeypatch.setattr(SD3, "condition", counted)
    assert run("sd3", steps=5).code == 0
    assert len(calls) == 1


def test_a_second_generation_in_the_process_is_bit_identical(run):
    done = run("sd3", "perf.repeat=3", "--num-samples", "2")
    assert done.code == 0, done.err
    assert "is not the same" not in done.err


def test_a_prompt_that_the_encoder_cuts_is_a_warning(run):
    done = run("sd3", "sampling.max_sequence_length=4")
    assert done.code == 0, done.err
    (line,) = [line for line in done.lines if line.startswith("WARNING: The text encoder takes 4 tokens")]
    assert "cat" in line or "at" in line


def test_the_work_of_the_native_network_is_counted(run):
    assert run("sd3", "--perf-dump-path", "ours.json", "--backend", "sglang", folder="ours").code == 0
    assert run("sd3", "--perf-dump-path", "theirs.json", "--backend", "diffusers", folder="theirs").code == 0
    ours, theirs = (json.loads(Path(f"{name}.json").read_text())["work"]["denoising"] for name in ("ours", "theirs"))
    assert 0.8 * theirs["flops"] < ours["flops"] < theirs["flops"]  # what all steps share is counted once


def test_noise_of_an_earlier_run_is_taken_by_either_backend(run):
    assert run("sd3", folder="first").code == 0
    noise = "sampling.latents=first/generated_image_0.safetensors"
    for backend in ("sglang", "diffusers"):
        done = run("sd3", noise, "--backend", backend, folder=backend)
        assert done.code == 0, done.err
        assert_same(backend, "first", 1)
