"""Pictures and masks on the diffusers backend: a sample is the same alone and in any batch."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
from cases import mostly_slow
from native import edited, error, tensors
from PIL import Image

NAMES = ["sd15", "sdxl", "sd3", "flux"]
SIZE = (32, 48)


@pytest.fixture
def run(pipelines, sglang):
    def generate(name: str, seed: int, folder: str, *words: object):
        height, width = SIZE
        return sglang("generate", "--model-path", pipelines.get(name, name), "--prompt", "a cat", "--seed", seed,
                      "output.latents=true", "--output-path", folder, "--dtype", "float32", "--height", height,
                      "--width", width, "--num-inference-steps", 4, "--guidance-scale", 3, "--backend", "diffusers",
                      *words)  # fmt: skip

    return generate


@pytest.fixture
def photo() -> str:
    """A picture with structure, in the size of the run, and beside it a mask of its middle, mask.png."""
    rows, columns = np.linspace(0, 200, SIZE[0]), np.linspace(30, 255, SIZE[1])
    pixels = np.stack([rows[:, None] + 0 * columns, columns + 0 * rows[:, None], rows[:, None] * columns / 255], -1)
    Image.fromarray(pixels.astype(np.uint8)).save("photo.png")
    mask = np.zeros(SIZE, np.uint8)
    mask[8:24, 10:36] = 255
    Image.fromarray(mask).save("mask.png")
    return "photo.png"


def remade(folder: Path, pipeline: str, **parts: dict) -> str:
    """A copy of a pipeline's folder for a class of that name, with other values in the configs of some parts."""
    copied = edited(folder, "remade", "model_index.json", _class_name=pipeline)
    for part, changes in parts.items():
        kind = getattr(diffusers, json.loads((copied / part / "config.json").read_text())["_class_name"])
        config = kind.load_config(copied / part) | changes
        shutil.rmtree(copied / part)
        tiny.fill(kind.from_config(config), 77).save_pretrained(copied / part)
    return str(copied)


def assert_samples_stand_alone(run, name: str, *words: object) -> None:
    """Three samples in one batch, and each of them with its own seed and nobody beside it."""
    done = run(name, 7, "batch", *words, "--num-samples", "3", "sampling.batch_size=3")
    assert done.code == 0, done.err
    for number in range(3):
        done = run(name, 7 + number, f"alone{number}", *words)
        assert done.code == 0, done.err
        batch, alone = tensors("batch", number), tensors(f"alone{number}")
        for what in ("noise", "latents"):
            assert error(batch[what], alone[what]) <= 1e-5, (what, number)
    assert error(tensors("batch", 0)["noise"], tensors("batch", 1)["noise"]) > 0.1


def masked(**others: object) -> tuple[str, str]:
    return "--diffusers-kwargs", json.dumps({"mask_image": "mask.png", **others})


@pytest.mark.whole
@pytest.mark.parametrize("name", mostly_slow(NAMES, "sd3", "flux"))
def test_a_sample_of_image_to_image_is_the_same_alone_and_in_a_batch(run, photo, name):
    assert_samples_stand_alone(run, name, "--image-path", photo, "--diffusers-kwargs", '{"strength": 0.6}')


@pytest.mark.slow
@pytest.mark.parametrize("strength", mostly_slow([0.6, 1.0], 0.6))
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_inpainting_is_the_same_alone_and_in_a_batch(pipelines, run, photo, name, strength):
    if name == "sd3":  # diffusers inpaints with 16 channels alone
        vae, transformer = {"latent_channels": 16}, {"in_channels": 16, "out_channels": 16}
        name = remade(pipelines[name], "StableDiffusion3InpaintPipeline", vae=vae, transformer=transformer)
    assert_samples_stand_alone(run, name, "--image-path", photo, *masked(strength=strength))


@pytest.mark.whole
def test_a_sample_of_a_network_that_sees_the_mask_is_the_same_alone_and_in_a_batch(pipelines, run, photo):
    model = remade(pipelines["sd15"], "StableDiffusionInpaintPipeline", unet={"in_channels": 9})
    assert_samples_stand_alone(run, model, "--image-path", photo, *masked(strength=0.6))


@pytest.mark.whole
def test_a_sample_of_flux_fill_is_the_same_alone_and_in_a_batch(pipelines, run, photo):
    transformer = {"in_channels": 16 + 16 + 4 * 2 * 2, "out_channels": 16}
    model = remade(pipelines["flux"], "FluxFillPipeline", transformer=transformer)
    assert_samples_stand_alone(run, model, "--image-path", photo, *masked())


@pytest.mark.whole
def test_a_sample_of_an_edit_is_the_same_alone_and_in_a_batch(run, photo, tmp_path):
    model = str(tiny.pix2pix(tmp_path / "pix2pix"))
    assert_samples_stand_alone(run, model, "--image-path", photo)
