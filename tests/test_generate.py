"""Text to image on the diffusers backend: each setting is seen in what the pipeline receives or produces."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sglang_gen import generate
from sglang_gen.models.sd3 import SD3

SIZE = ("--height", "32", "--width", "32", "--num-inference-steps", "2")
SMALL = (*SIZE, "--seed", "7")


def picture(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def received(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict]:
    """Collects the keyword arguments of every call of a diffusers pipeline class."""
    calls: list[dict] = []
    cls = getattr(diffusers, name)
    call = cls.__call__

    def noted(self, **kwargs):
        calls.append(kwargs)
        return call(self, **kwargs)

    noted.__signature__ = __import__("inspect").signature(call)
    monkeypatch.setattr(cls, "__call__", noted)
    return calls


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_the_picture_is_the_one_that_plain_diffusers_makes(pipelines, sglang, name):
    done = sglang("generate", "--model-path", pipelines[name], "--prompt", "a cat, sitting", *SMALL,
                  "--guidance-scale", "4", "--dtype", "float32")  # fmt: skip
    assert done.code == 0, done.err
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines[name], dtype=torch.float32)
    expected = pipeline(
        "a cat, sitting", height=32, width=32, num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    ours = picture("outputs/generated_image_0.png").astype(int)
    assert np.abs(ours - np.asarray(expected)).max() <= 1  # the native engine rounds on other ways


def test_every_sampling_flag_reaches_the_pipeline(pipelines, sglang, monkeypatch):
    calls = received(monkeypatch, "StableDiffusionXLPipeline")
    done = sglang(
        "generate", "--model-path", pipelines["sdxl"], "--prompt", "a", "--negative-prompt", "b",
        "--num-inference-steps", "3", "--guidance-scale", "9.5", "--height", "32", "--width", "64", "--seed", "5",
        "--num-samples", "2", "sampling.batch_size=2", "--diffusers-kwargs", '{"clip_skip": 1}',
    )  # fmt: skip
    assert done.code == 0, done.err
    (call,) = calls
    assert call["prompt"] == ["a", "a"]
    assert call["negative_prompt"] == ["b", "b"]
    assert (call["num_inference_steps"], call["guidance_scale"]) == (3, 9.5)
    assert (call["height"], call["width"], call["clip_skip"]) == (32, 64, 1)
    assert [generator.initial_seed() for generator in call["generator"]] == [5, 6]
    assert picture("outputs/generated_image_1.png").shape == (32, 64, 3)


@pytest.mark.whole
def test_a_sample_is_the_same_alone_and_in_any_batch(pipelines, sglang):
    common = ("generate", "--model-path", pipelines["sd3"], "--prompt", "a", "--dtype", "float32", *SIZE, "--seed")
    assert sglang(*common, "7", "--num-samples", "3", "sampling.batch_size=1", "--output-path", "one").code == 0
    assert sglang(*common, "7", "--num-samples", "3", "sampling.batch_size=2", "--output-path", "two").code == 0
    assert sglang(*common, "9", "--output-path", "single").code == 0
    third = picture("one/generated_image_2.png")
    assert np.array_equal(third, picture("single/generated_image_0.png"))
    assert np.abs(third.astype(int) - picture("two/generated_image_2.png")).max() <= 1
    assert not np.array_equal(third, picture("one/generated_image_0.png"))


@pytest.mark.whole
def test_prompts_file_gives_each_line_its_own_picture_and_seed(pipelines, sglang, monkeypatch):
    calls = received(monkeypatch, "StableDiffusion3Pipeline")
    Path("prompts.txt").write_text('a red fox\n\n{"prompt": "{b}", "seed": 40, "negative_prompt": "n"}\n', "utf-8")
    done = sglang("generate", "--model-path", pipelines["sd3"], *SMALL, "sampling.prompts_file=prompts.txt",
                  "sampling.batch_size=4", "--num-samples", "2", "--backend", "diffusers")  # fmt: skip
    assert done.code == 0, done.err
    assert [call["prompt"] for call in calls] == [["a red fox"] * 2, ["{b}"] * 2]
    assert [[item.initial_seed() for item in call["generator"]] for call in calls] == [[7, 8], [40, 41]]
    assert "negative_prompt" not in calls[0]
    assert calls[1]["negative_prompt"] == ["n", "n"]
    record = json.loads(Path("outputs/generated_image_3.json").read_text())
    assert record["sample"] == {"index": 3, "prompt": "{b}", "negative_prompt": "n", "seed": 41}
    assert record["run"]["sampling"]["prompts_file"] is None
    assert [entry["prompt"] for entry in record["run"]["sampling"]["prompts"]] == ["a red fox", "{b}"]


@pytest.mark.whole
@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_is_the_dtype_of_the_loaded_networks(pipelines, sglang, monkeypatch, name, dtype):
    seen = []
    forward = diffusers.SD3Transformer2DModel.forward
    monkeypatch.setattr(
        diffusers.SD3Transformer2DModel, "forward",
        lambda self, *args, **kwargs: seen.append(self.dtype) or forward(self, *args, **kwargs),
    )  # fmt: skip
    ours = SD3.forward
    monkeypatch.setattr(
        SD3, "forward", lambda self, x, *rest: seen.extend([self.out.weight.dtype, x.dtype]) or ours(self, x, *rest)
    )
    for backend in ("diffusers", "sglang"):
        seen.clear()
        done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, "--dtype", name,
                      "--backend", backend)  # fmt: skip
        assert done.code == 0, done.err
        assert set(seen) == {dtype}


def test_diffusers_kwargs_reach_the_call_and_the_scheduler(pipelines, sglang, monkeypatch):
    calls = received(monkeypatch, "StableDiffusionXLPipeline")
    done = sglang("generate", "--model-path", pipelines["sdxl"], "--prompt", "a", *SMALL, "--diffusers-kwargs",
                  '{"eta": 0.5, "use_karras_sigmas": true}')  # fmt: skip
    assert done.code == 0, done.err
    assert calls[0]["eta"] == 0.5
    assert "WARNING: eta has no effect with EulerDiscreteScheduler" in done.lines
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    assert record["effective"]["scheduler_config"]["use_karras_sigmas"] is True


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ('{"clip_skp": 1}', "did you mean 'clip_skip'?"),
        ('{"num_inference_steps": 3}', "'num_inference_steps' is set by --num-inference-steps"),
        ('{"output_type": "pil"}', "'output_type' is set by sglang-gen itself"),
    ],
)
def test_diffusers_kwargs_that_cannot_be_taken_are_named(pipelines, sglang, kwargs, sentence):
    done = sglang("generate", "--model-path", pipelines["sdxl"], "--prompt", "a", "--diffusers-kwargs", kwargs)
    assert done.code == 2
    assert sentence in done.err


@pytest.mark.whole
def test_component_paths_replace_one_component(pipelines, sglang, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(pipelines["sdxl"], subfolder="vae")
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(vae.decoder.conv_out.bias)
    vae.save_pretrained(tmp_path / "grey" / "vae")
    common = ("generate", "--model-path", pipelines["sdxl"], "--prompt", "a", *SMALL, "--component-paths")
    for number, folder in enumerate([tmp_path / "grey" / "vae", tmp_path / "grey"]):
        done = sglang(*common, json.dumps({"vae": str(folder)}))
        assert done.code == 0, done.err
        assert np.unique(picture(f"outputs/generated_image_{number}.png")).tolist() in ([127], [128])
    wrong = sglang(*common, '{"vea": "x"}')
    assert (wrong.code, "did you mean 'vae'?" in wrong.err) == (2, True)
    missing = sglang(*common, '{"vae": "/nowhere/vae"}')
    assert (missing.code, "the folder /nowhere/vae of 'vae' does not exist" in missing.err) == (2, True)


@pytest.mark.whole
def test_pipeline_class_name_chooses_the_class(pipelines, sglang, monkeypatch):
    calls = received(monkeypatch, "StableDiffusionPAGPipeline")
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *SMALL, "--pipeline-class-name",
                  "StableDiffusionPAGPipeline", "--diffusers-kwargs", '{"pag_scale": 0.0}')  # fmt: skip
    assert done.code == 0, done.err
    assert len(calls) == 1
    wrong = sglang(
        "generate", "--model-path", pipelines["sd15"], "--prompt", "a", "--pipeline-class-name", "FluxPipline"
    )
    assert (wrong.code, "did you mean 'FluxPipeline'?" in wrong.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("StableDiffusionImg2ImgPipeline", "an input image: --image-path FILE"),
        ("StableDiffusionInpaintPipeline", "an input image: --image-path FILE"),
        ("DDPMPipeline", "a pipeline that does"),
    ],
)
def test_pipelines_that_need_more_say_what(pipelines, sglang, name, need):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", "--pipeline-class-name", name)
    assert done.code == 2
    assert done.lines[-1].startswith(f"ERROR: {name} ")
    assert need in done.lines[-1]


@pytest.mark.whole
def test_max_sequence_length_reaches_the_text_encoder(pipelines, sglang, monkeypatch):
    calls = received(monkeypatch, "FluxPipeline")
    common = ("generate", "--model-path", pipelines["flux"], "--prompt", "a", *SMALL, "--backend", "diffusers")
    assert sglang(*common, "sampling.max_sequence_length=16").code == 0
    assert calls[0]["max_sequence_length"] == 16
    sdxl = sglang("generate", "--model-path", pipelines["sdxl"], "--prompt", "a", *SMALL,
                  "sampling.max_sequence_length=16")  # fmt: skip
    assert sdxl.code == 0
    assert (
        "WARNING: sampling.max_sequence_length has no effect: StableDiffusionXLPipeline does not take it" in sdxl.lines
    )


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_negative_prompt_that_cannot_act_is_a_warning(pipelines, sglang, backend):
    common = ("--prompt", "a", *SMALL, "--negative-prompt", "b", "--backend", backend)
    flux = sglang("generate", "--model-path", pipelines["flux"], *common)
    assert flux.code == 0
    assert any("negative prompt has no effect at a true_cfg_scale of 1.0" in line for line in flux.lines)
    for scale, said in (("1", True), ("1.1", False)):
        sd3 = sglang("generate", "--model-path", pipelines["sd3"], *common, "--guidance-scale", scale)
        assert sd3.code == 0
        assert ("WARNING: The negative prompt has no effect at a guidance scale of 1.0" in sd3.lines) is said


@pytest.mark.whole
def test_noise_and_latents_are_saved_and_the_noise_starts_another_run(pipelines, sglang):
    common = ("generate", "--model-path", pipelines["sdxl"], "--prompt", "a", "--dtype", "float32", *SIZE, "--seed")
    assert sglang(*common, "7", "output.latents=true").code == 0
    kept = load_file("outputs/generated_image_0.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in kept.items()} == {
        "noise": (4, 16, 16),
        "latents": (4, 16, 16),
    }
    again = sglang(*common, "99", "sampling.latents=outputs/generated_image_0.safetensors")
    assert again.code == 0, again.err
    assert np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))
    other = sglang("generate", "--model-path", pipelines["sdxl"], "--prompt", "a", "--height", "64", "--width", "64",
                   "sampling.latents=outputs/generated_image_0.safetensors")  # fmt: skip
    assert other.code == 2
    assert "holds noise of shape [1, 4, 16, 16], this request starts from [1, 4, 32, 32]" in other.err


def test_each_sample_of_a_batch_has_its_own_noise_and_latents_beside_it(pipelines, sglang):
    common = ("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, "--dtype", "float32",
              "output.latents=true", "--num-samples", "2", "--guidance-scale", "3")  # fmt: skip
    for size in (2, 1):
        assert sglang(*common, f"sampling.batch_size={size}").code == 0
    together, alone = ([load_file(f"outputs/generated_image_{number}.safetensors") for number in pair]
                       for pair in ((0, 1), (2, 3)))  # fmt: skip
    for name in ("noise", "latents"):
        for a, b in zip(together, alone, strict=True):
            assert (a[name] - b[name]).abs().max() <= 1e-5 * b[name].abs().max()
        assert (together[0][name] - together[1][name]).abs().max() > 0.1


def test_saved_latents_decode_to_the_picture(pipelines, sglang):
    assert sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, "--dtype", "float32",
                  "output.latents=true").code == 0  # fmt: skip
    latents = load_file("outputs/generated_image_0.safetensors")["latents"].unsqueeze(0)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(pipelines["sd3"], dtype=torch.float32)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 1.5305 + 0.0609).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="np")[0]
    assert np.array_equal(picture("outputs/generated_image_0.png"), np.rint(expected * 255).astype(np.uint8))


@pytest.mark.whole
def test_warmup_runs_before_the_clock_and_changes_no_picture(pipelines, sglang, monkeypatch):
    calls = received(monkeypatch, "StableDiffusion3Pipeline")
    common = ("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, "--backend", "diffusers")
    assert sglang(*common).code == 0
    assert sglang(*common, "--warmup", "--warmup-steps", "3", "--perf-dump-path", "perf.json").code == 0
    assert [call["num_inference_steps"] for call in calls] == [2, 3, 2]
    assert np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))
    dump = json.loads(Path("perf.json").read_text())
    assert dump["warmup"]["steps"] == 3
    assert len(dump["denoise_steps_ms"]) == 2


def test_deterministic_is_on_for_the_run_and_off_afterwards(pipelines, sglang, monkeypatch):
    seen = []
    forward = diffusers.SD3Transformer2DModel.forward
    monkeypatch.setattr(
        diffusers.SD3Transformer2DModel, "forward",
        lambda self, *args, **kwargs: (
            seen.append(torch.are_deterministic_algorithms_enabled()) or forward(self, *args, **kwargs)
        ),
    )  # fmt: skip
    assert sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, "deterministic=true").code == 0
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_function_gives_frames_paths_and_seeds(pipelines):
    result = generate("sampling.batch_size=2", model_path=str(pipelines["sd3"]), prompt="a", height=32, width=32,
                      num_inference_steps=2, seed=3, num_samples=3, dtype="float32")  # fmt: skip
    assert result is not None
    assert result.seeds == (3, 4, 5)
    assert [path.name for path in result.paths] == [f"generated_image_{index}.png" for index in range(3)]
    for path, frame in zip(result.paths, result.frames, strict=True):
        assert np.array_equal(picture(path), frame)
    assert result.report["images_per_second"] > 0


def test_latents_of_a_foreign_file_are_refused(pipelines, sglang):
    save_file({"other": torch.zeros(1)}, "other.safetensors")
    common = ("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL)
    assert "holds no tensor 'noise'" in sglang(*common, "sampling.latents=other.safetensors").err
    assert sglang(*common, "sampling.latents=none.safetensors").code == 2
