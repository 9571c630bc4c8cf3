"""The embedded model: what ships, that plain diffusers loads it, and that the command draws with it by default."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sglang_gen import env

PROMPT = "A serene landscape with mountains and a lake at sunset"


def test_the_weights_are_bfloat16_and_at_most_24_megabytes():
    from safetensors import safe_open

    files = sorted(env.embedded_model().glob("*/*.safetensors"))
    assert len(files) == 5  # denoiser, autoencoder, three text encoders
    assert sum(path.stat().st_size for path in files) <= 24 * 10**6
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}, path  # noqa: SIM118


def test_no_config_names_a_folder_of_the_machine_that_trained_it():
    for path in env.embedded_model().rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


@pytest.mark.whole
def test_the_command_draws_with_it_when_no_model_is_given(sglang):
    done = sglang("generate", "--prompt", PROMPT, "--seed", "42", "--num-inference-steps", "8")
    assert done.code == 0, done.err
    assert done.lines[0] == "INFO: No model given: using the embedded model 'landscape'"
    image = np.asarray(Image.open("outputs/generated_image_0.png"))
    assert min(image.shape[:2]) >= 128
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    assert record["run"]["model"]["path"] is None
    assert record["sources"]["sampling.guidance_scale"] == "preset"


@pytest.mark.whole
def test_plain_diffusers_makes_the_same_picture(sglang):
    assert sglang("generate", "--prompt", PROMPT, "--seed", "3", "--num-inference-steps", "4", "--dtype", "float32",
                  "--guidance-scale", "4", "sampling.max_sequence_length=32").code == 0  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(env.embedded_model(), dtype=torch.float32)
    expected = pipeline(PROMPT, num_inference_steps=4, guidance_scale=4.0, max_sequence_length=32,
                        generator=torch.Generator("cpu").manual_seed(3)).images[0]  # fmt: skip
    ours = np.asarray(Image.open("outputs/generated_image_0.png")).astype(int)
    assert np.abs(ours - np.asarray(expected)).max() <= 1  # which processors round products alike differs


@pytest.mark.whole
def test_the_time_of_day_is_seen_in_the_sky(sglang):
    sky = {}
    for number, time in enumerate(("noon", "night")):
        prompt = f"a landscape with hills at {time}, clear sky"
        assert sglang("generate", "--prompt", prompt, "--seed", "5", "--num-inference-steps", "12").code == 0
        picture = np.asarray(Image.open(f"outputs/generated_image_{number}.png")).astype(float)
        sky[time] = picture[: picture.shape[0] // 4].mean()
    assert sky["noon"] > sky["night"] + 60


@pytest.mark.slow
def test_the_negative_prompt_and_the_guidance_act(sglang):
    common = ("generate", "--prompt", "a landscape with hills", "--seed", "5", "--num-inference-steps", "12")
    for extra in ((), ("--negative-prompt", "at night"), ("--guidance-scale", "1")):
        assert sglang(*common, *extra).code == 0
    first, negative, unguided = (
        np.asarray(Image.open(f"outputs/generated_image_{number}.png")).astype(float) for number in range(3)
    )
    assert np.abs(first - negative).mean() > 2
    assert np.abs(first - unguided).mean() > 2


@pytest.mark.whole
def test_any_text_is_a_prompt(sglang):
    for prompt in ("🏔️🌅", "Ünïcödé \n\t \x00", "zxqv " * 200, "Abstract art with vibrant colors"):
        done = sglang("generate", "--prompt", prompt, "--seed", "1", "--num-inference-steps", "1")
        assert done.code == 0, done.err
