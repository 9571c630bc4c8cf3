"""An autoencoder in one file, in diffusers' layout or the original one, gives the image of its folder."""

import json
from pathlib import Path

import numpy as np
import original_layout
import pytest
import torch
from diffusers import AutoencoderKL
from native import picture
from safetensors.torch import load_file, save_file

BACKENDS = pytest.mark.parametrize("backend", ["sglang", "diffusers"])
SMALL = ("--prompt", "a", "--height", 32, "--width", 32, "--num-inference-steps", 1, "--seed", 7, "--dtype", "float32")
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def as_saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


def old(folder: Path) -> dict[str, torch.Tensor]:
    weights = as_saved(folder)
    for new, before in OLD.items():
        weights = {name.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): w for name, w in weights.items()}
    return weights


def original(folder: Path, prefix: str = "first_stage_model.") -> dict[str, torch.Tensor]:
    named = original_layout.vae(AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32))
    return {prefix + name.removeprefix("first_stage_model."): weight for name, weight in named.items()}


def bare(folder: Path) -> dict[str, torch.Tensor]:
    return original(folder, "")


def run(sglang, model, backend, *words):
    return sglang("generate", "--model-path", model, *SMALL, "--backend", backend, *words)


def paths(name: str, file: Path) -> tuple[str, str]:
    return "--component-paths", json.dumps({name: str(file)})


@pytest.mark.whole
@BACKENDS
@pytest.mark.parametrize("layout", [as_saved, old, original, bare])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_file_gives_the_image_of_the_folder(pipelines, sglang, backend, layout, name):
    changed = {key: weight * 1.01 for key, weight in layout(pipelines[name]).items()}
    save_file({key: weight.contiguous() for key, weight in changed.items()}, "vae.safetensors")
    folder = Path("vae")
    folder.mkdir()
    (folder / "config.json").write_text((pipelines[name] / "vae" / "config.json").read_text())
    same = {key: weight * 1.01 for key, weight in as_saved(pipelines[name]).items()}
    save_file(same, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for words in (paths("vae", Path("vae.safetensors")), paths("vae", folder), ()):
        done = run(sglang, pipelines[name], backend, *words)
        assert done.code == 0, done.err
    file, reference, own = (picture(f"outputs/generated_image_{index}.png").astype(int) for index in range(3))
    assert np.abs(file - reference).max() <= 1
    assert not np.array_equal(file, own)


@BACKENDS
@pytest.mark.parametrize("dry", [True, False])
def test_another_file_is_refused_before_loading(pipelines, sglang, backend, dry):
    words = ("dry_run=true",) if dry else ()
    weights = as_saved(pipelines["sdxl"])
    lost = sorted(weights)[0]
    for tensors, sentence in (
        ({name: w for name, w in weights.items() if name != lost}, f"it lacks 1 of its tensors, such as {lost}"),
        (weights | {lost: torch.zeros(3)}, f"{lost} has the shape [3] in place of "),
        ({"a.weight": torch.zeros(2)}, "is neither in diffusers' layout of AutoencoderKL nor in the original one"),
    ):
        save_file(tensors, "other.safetensors")
        done = run(sglang, pipelines["sdxl"], backend, *paths("vae", Path("other.safetensors")), *words)
        assert done.code == 2
        assert done.lines[-1].startswith("ERROR: --component-paths: other.safetensors is ")
        assert sentence in done.lines[-1]


@BACKENDS
def test_a_file_of_another_component_is_refused(pipelines, sglang, backend):
    save_file({"a": torch.zeros(2)}, "encoder.safetensors")
    done = run(sglang, pipelines["sdxl"], backend, *paths("text_encoder", Path("encoder.safetensors")))
    assert done.code == 2
    assert done.lines[-1].endswith("(CLIPTextModel), and only the weights of AutoencoderKL are read from one file")
    Path("vae.pt").write_bytes(b"x")
    done = run(sglang, pipelines["sdxl"], backend, *paths("vae", Path("vae.pt")))
    assert (done.code, "is pickled" in done.lines[-1]) == (2, True)
