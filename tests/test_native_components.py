"""Components of the native engine that come from elsewhere: --component-paths, on both backends the same picture."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from little_hub import LittleHub
from native import COMMON, assert_same, edited, picture, record
from tiny import fill
from transformers import CLIPTextModel

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "--guidance-scale", "3")


@pytest.fixture
def run(pipelines, sglang):
    def generate(name, *words: object, folder: str = "outputs"):
        return sglang("generate", "--model-path", pipelines.get(name, name), "--prompt", "a cat", *COMMON, *SMALL,
                      "--dtype", "float32", "--output-path", folder, *words)  # fmt: skip

    return generate


def both_make_the_same(run, name, *words: object) -> None:
    for backend in ("sglang", "diffusers"):
        done = run(name, *words, "--backend", backend, folder=backend)
        assert done.code == 0, done.err
        assert record(backend)["effective"]["backend"] == backend
    assert_same("sglang", "diffusers", 1)


def other(kind, folder: Path, name: str) -> Path:
    """A component of the same shape with other weights, in a folder of that name."""
    fill(kind.from_pretrained(folder, dtype=torch.float32), 99).save_pretrained(name)
    return Path(name)


def given(**paths: object) -> tuple[str, str]:
    return "--component-paths", json.dumps({name: str(path) for name, path in paths.items()})


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("sdxl", "vae", diffusers.AutoencoderKL),
        ("sd15", "text_encoder", CLIPTextModel),
        ("sdxl", "unet", diffusers.UNet2DConditionModel),
        ("flux", "transformer", diffusers.FluxTransformer2DModel),
    ],
)
def test_a_component_of_another_folder_is_the_one_that_computes(pipelines, run, name, part, kind):
    both_make_the_same(run, name, *given(**{part: other(kind, pipelines[name] / part, "other")}))
    assert run(name, folder="own").code == 0
    assert not np.array_equal(picture("own/generated_image_0.png"), picture("sglang/generated_image_0.png"))


@pytest.mark.whole
def test_a_models_folder_gives_its_component_and_a_scheduler_its_own_class(pipelines, run):
    edited(pipelines["sdxl"], "model", "scheduler/scheduler_config.json", _class_name="DDIMScheduler")
    other(diffusers.AutoencoderKL, pipelines["sdxl"] / "vae", "model/vae")
    both_make_the_same(run, "sdxl", *given(vae="model", scheduler="model/scheduler"))
    assert record("sglang")["effective"]["components"]["scheduler"] == "DDIMScheduler"


@pytest.mark.whole
def test_the_network_that_comes_from_elsewhere_is_checked_and_another_may_have_another_shape(pipelines, run):
    odd = edited(pipelines["sdxl"], "odd", "unet/config.json", class_embed_type="timestep")
    done = run("sdxl", "--backend", "sglang", *given(unet=odd))
    assert done.code == 2
    assert "cannot run this: its unet does not support class_embed_type=timestep; run with --backend" in done.lines[-1]
    config = json.loads((pipelines["sdxl"] / "unet" / "config.json").read_text()) | {"layers_per_block": 1}
    fill(diffusers.UNet2DConditionModel.from_config(config), 5).save_pretrained("shallow")
    both_make_the_same(run, "sdxl", *given(unet="shallow"))


@pytest.mark.whole
def test_a_class_that_is_not_ours_runs_on_diffusers(run):
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    fill(tiny, 3).save_pretrained("taesd")
    done = run("sdxl", *given(vae="taesd"))
    assert done.code == 0, done.err
    reason = "its vae has the class AutoencoderTiny in place of AutoencoderKL"
    assert f"INFO: Backend: diffusers (the native engine cannot run this: {reason})" in done.lines
    assert record("outputs")["effective"]["components"]["vae"] == "AutoencoderTiny"


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_folder_that_is_no_component_is_one_sentence(pipelines, run, backend, part):
    Path("empty").mkdir()
    shutil.copytree(pipelines["sdxl"] / part, "bare")
    Path("bare/diffusion_pytorch_model.safetensors").unlink()
    sentences = {
        "empty": f"--component-paths: empty holds no '{part}'",
        "bare": "bare holds no weights (*.safetensors)",
    }
    for path, sentence in sentences.items():
        done = run("sdxl", "--backend", backend, *given(**{part: path}))
        assert (done.code, done.lines[-1].startswith(f"ERROR: {sentence}")) == (2, True), done.err


def test_weights_that_lack_a_tensor_are_refused_by_its_name(pipelines, run):
    from safetensors.torch import load_file, save_file

    shutil.copytree(pipelines["sd15"] / "text_encoder", "encoder")
    weights = load_file("encoder/model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, "encoder/model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    done = run("sd15", "--backend", "sglang", *given(text_encoder="encoder"))
    assert done.code == 2
    assert "encoder is not a checkpoint of CLIPTextModel: it lacks 1 of its tensors" in done.lines[-1]
    assert "layers.1.mlp.fc1.weight" in done.lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_a_component_of_the_hub_is_planned_from_its_config_and_runs_natively(
    pipelines, run, tmp_path, monkeypatch, inside
):
    hub = LittleHub()
    hub.install(monkeypatch, tmp_path)
    repository = tmp_path / "repository"
    folder = repository / "vae" if inside else repository
    other(diffusers.AutoencoderKL, pipelines["sdxl"] / "vae", str(folder))
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", folder / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", repository / "whole.safetensors")
    hub.repos["tiny/vae"] = {"main": repository}
    planned = run("sdxl", "dry_run=true", *given(vae="tiny/vae"))
    assert planned.code == 0, planned.err
    assert not any(name.endswith(".safetensors") for name in hub.files_fetched())
    for backend in ("sglang", "diffusers"):
        done = run("sdxl", "--backend", backend, *given(vae="tiny/vae"), folder=backend)
        assert done.code == 0, done.err
    assert_same("sglang", "diffusers", 1)
    place = "vae/" if inside else ""
    weights = {name for name in hub.files_fetched() if name.endswith(".safetensors")}
    assert weights == {f"{place}diffusion_pytorch_model.safetensors"}
    assert run("sdxl", *given(vae=folder), folder="local").code == 0
    assert_same("sglang", "local", 1)
    hub.close()
