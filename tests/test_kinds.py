"""Kinds of pipelines from end to end: each gives what the plain diffusers class gives at the same seed."""

import json
import shutil
import wave
from pathlib import Path

import diffusers
import imageio.v3 as imageio
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sglang_gen.backends.diffusers import pipeline_signature

COMMON = ("--seed", "7", "--dtype", "float32", "--num-inference-steps", "3")


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(7)


def load(folder: Path) -> diffusers.DiffusionPipeline:
    return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def record(name: str) -> dict:
    return json.loads(Path(f"outputs/{name}.json").read_text())


@pytest.fixture
def photo() -> str:
    """A picture with structure: a gradient with a bright square."""
    pixels = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    pixels[8:16, 8:16] = (250, 240, 30)
    Image.fromarray(pixels).save("photo.png")
    return "photo.png"


@pytest.mark.whole
def test_editing_by_instruction_changes_the_picture(tmp_path, sglang, photo):
    folder = tiny.pix2pix(tmp_path / "tiny-pix2pix")
    done = sglang("generate", "--model-path", folder, "--prompt", "make it night", "--image-path", photo,
                  "--negative-prompt", "day", "--diffusers-kwargs", '{"image_guidance_scale": 1.2}',
                  *COMMON)  # fmt: skip
    assert done.code == 0, done.err
    expected = load(folder)("make it night", image=Image.open(photo), negative_prompt="day", image_guidance_scale=1.2,
                            guidance_scale=7.5, num_inference_steps=3, generator=generator()).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(Image.open("outputs/generated_image_0.png")), np.asarray(expected))
    without = sglang("generate", "--model-path", folder, "--prompt", "make it night", *COMMON)
    assert (without.code, "needs an input image: --image-path FILE" in without.err) == (2, True)


def test_a_text_to_image_model_edits_with_the_class_that_edits(pipelines, sglang, photo):
    words = ("--pipeline-class-name", "FluxKontextPipeline", "--image-path", photo, "--height", "32", "--width", "32")
    settings = {"_auto_resize": False, "max_area": 1024}
    done = sglang("generate", "--model-path", pipelines["flux"], "--prompt", "a fox", *words, "--diffusers-kwargs",
                  json.dumps(settings), *COMMON)  # fmt: skip
    assert done.code == 0, done.err
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(pipelines["flux"], dtype=torch.float32)
    expected = pipeline(image=Image.open(photo), prompt="a fox", height=32, width=32, guidance_scale=7.5,
                        num_inference_steps=3, generator=generator(), **settings).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(Image.open("outputs/generated_image_0.png")), np.asarray(expected))


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio's reader leaves its pipe to the garbage collector
def test_a_picture_becomes_a_video(tmp_path, sglang, photo):
    folder = tiny.wan_i2v(tmp_path / "tiny-wan-i2v")
    words = ("--height", "16", "--width", "16", "--num-frames", "9", "--fps", "8", "--guidance-scale", "3")
    done = sglang("generate", "--model-path", folder, "--prompt", "a fox runs", "--image-path", photo, *words, *COMMON)
    assert done.code == 0, done.err
    frames = load(folder)(image=Image.open(photo), prompt="a fox runs", height=16, width=16, num_frames=9,
                          guidance_scale=3.0, num_inference_steps=3, generator=generator()).frames[0]  # fmt: skip
    read = imageio.imread("outputs/generated_video_0.mp4").astype(float)
    assert read.shape == (9, 16, 16, 3)
    assert imageio.immeta("outputs/generated_video_0.mp4")["fps"] == 8
    assert np.abs(read.mean((1, 2)) - 255 * np.asarray(frames).mean((1, 2))).max() < 12  # 4:2:0 colour, lossy
    assert record("generated_video_0")["effective"]["pipeline"] == "WanImageToVideoPipeline"
    without = sglang("generate", "--model-path", folder, "--prompt", "a fox runs", *words, *COMMON)
    assert (without.code, "needs an input image: --image-path FILE" in without.err) == (2, True)


@pytest.mark.whole
def test_a_text_to_video_model_takes_no_picture_unless_its_weights_do(tmp_path, sglang, photo):
    folder = tiny.wan(tmp_path / "tiny-wan")
    done = sglang("generate", "--model-path", folder, "--prompt", "a", "--image-path", photo, *COMMON)
    assert done.code == 2
    assert "WanPipeline takes no input image, and diffusers has no image to video pipeline" in done.lines[-1]
    if "ltx" in getattr(diffusers.pipelines.auto_pipeline, "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING", ()):
        found = pipeline_signature.find("LTXPipeline", image=True, mask=False)
        assert (found.pipeline_class.__name__, found.makes) == ("LTXImageToVideoPipeline", "video")


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # torch deprecates what diffusers builds it from
def test_a_sound_is_what_the_pipeline_returned(tmp_path, sglang):
    folder = tiny.stable_audio(tmp_path / "tiny-audio")
    done = sglang("generate", "--model-path", folder, "--prompt", "rain", "--num-samples", "2", "--diffusers-kwargs",
                  '{"audio_end_in_s": 0.7}', "--image-path", "x.png", *COMMON)  # fmt: skip
    assert (done.code, "StableAudioPipeline takes no input image" in done.err) == (2, True)
    done = sglang("generate", "--model-path", folder, "--prompt", "rain", "--num-samples", "2", "--diffusers-kwargs",
                  '{"audio_end_in_s": 0.7}', *COMMON)  # fmt: skip
    assert done.code == 0, done.err
    for number in (0, 1):
        (expected,) = load(folder)("rain", audio_end_in_s=0.7, num_inference_steps=3, guidance_scale=7.5,
                                   generator=torch.Generator("cpu").manual_seed(7 + number)).audios  # fmt: skip
        with wave.open(f"outputs/generated_audio_{number}.wav") as sound:
            assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 1000, 700)
            heard = np.frombuffer(sound.readframes(700), "<i2").reshape(-1, 2).T / 32767  # left and right by turns
        assert np.abs(heard - np.clip(expected.numpy(), -1, 1)).max() < 1e-4
        assert np.abs(heard[0] - heard[1]).max() > 0.01
    effective = record("generated_audio_0")["effective"]
    assert (effective["makes"], effective["sampling_rate"], effective["samples"]) == ("audio", 1000, 700)


@pytest.mark.parametrize("name", ["StableAudioPipeline", "AudioLDM2Pipeline", "AceStepPipeline"])
def test_pipelines_of_sound_are_known_as_such(name):
    if hasattr(diffusers, name):
        assert pipeline_signature.find(name, image=False, mask=False).makes == "audio"


SPARE = """
import diffusers
class SparePipeline(diffusers.StableDiffusionPipeline):
    def __call__(self, prompt=None, num_inference_steps=5, generator=None, output_type="pil"):
        return super().__call__(prompt, height=32, width=32, num_inference_steps=num_inference_steps,
                                generator=generator, output_type=output_type)
"""


def test_a_pipeline_that_lacks_an_argument_gets_a_warning(pipelines, tmp_path, sglang, monkeypatch):
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "spare")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["spare", "SparePipeline"]}))
    (folder / "spare.py").write_text(SPARE)
    done = sglang("generate", "--model-path", folder, "--trust-remote-code", "--prompt", "a cat", "--guidance-scale",
                  "3", "--negative-prompt", "dog", "--height", "64", "--num-frames", "4", *COMMON)  # fmt: skip
    assert done.code == 0, done.err
    for argument in ("guidance_scale", "negative_prompt", "height", "num_frames"):
        assert f"WARNING: sampling.{argument} has no effect: SparePipeline does not take it" in done.lines
    expected = load(pipelines["sd15"])("a cat", height=32, width=32, num_inference_steps=3, generator=generator())
    assert np.array_equal(np.asarray(Image.open("outputs/generated_image_0.png")), np.asarray(expected.images[0]))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_latents_that_a_pipeline_does_not_show_are_an_error(tmp_path, sglang):
    folder = tiny.stable_audio(tmp_path / "tiny-audio")
    done = sglang("generate", "--model-path", folder, "--prompt", "rain", "--diffusers-kwargs",
                  '{"audio_end_in_s": 0.7}', "output.latents=true", *COMMON)  # fmt: skip
    assert done.code == 1
    assert "StableAudioPipeline does not return its latents; leave out output.latents" in done.lines[-1]
