"""What the tests of the native engine share: reading what a run left, and comparing it with another's."""

import json
import shutil
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from sglang_gen.families import registry

COMMON = ("--seed", "7", "output.latents=true")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def picture(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(folder: str, number: int = 0) -> dict:
    return json.loads(Path(f"{folder}/generated_image_{number}.json").read_text())


def tensors(folder: str, number: int = 0) -> dict[str, np.ndarray]:
    """`noise` and `latents` of a picture."""
    held = load_file(f"{folder}/generated_image_{number}.safetensors")
    return {name: tensor.float().numpy() for name, tensor in held.items()}


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |a - b| / max |b|."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_same(ours: str, theirs: str, count: int, tolerance: float = 1e-5) -> None:
    """Noise exactly, latents to 1e-5 relative, pictures to one level."""
    for number in range(count):
        a, b = tensors(ours, number), tensors(theirs, number)
        assert np.array_equal(a["noise"], b["noise"])
        assert error(a["latents"], b["latents"]) <= tolerance, error(a["latents"], b["latents"])
        a, b = (picture(f"{folder}/generated_image_{number}.png") for folder in (ours, theirs))
        assert np.abs(a - b).max() <= 1


def edited(folder: Path, name: str, file: str, **changes: object) -> Path:
    """A copy of a pipeline's folder with other values in one of its JSON files."""
    copied = Path(name)
    shutil.copytree(folder, copied)
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copied


def with_scheduler(folder: Path, name: str, **settings: object) -> Path:
    """A copy of a pipeline's folder with another scheduler, for a diffusion model unless the settings say otherwise."""
    copied = edited(folder, "model", "model_index.json", scheduler=["diffusers", name])
    config = {"_class_name": name, **BETAS, **settings}
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return copied


def runner(pipelines: dict[str, Path], sglang):
    """A function that generates with a tiny pipeline by name, or with a folder; it gives the finished command."""

    def generate(name, *words: object, folder: str = "outputs", steps: int = 3, size=(32, 48), dtype: str = "float32"):
        given = ("--dtype", dtype, *(("--height", size[0], "--width", size[1]) if size else ()))
        return sglang("generate", "--model-path", pipelines.get(name, name), "--prompt", "a cat", *COMMON,
                      "--output-path", folder, *given, "--num-inference-steps", steps, *words)  # fmt: skip

    return generate


def assert_both_make_the_same(run, name, *words, **kwargs) -> None:
    """At a scale of 3 unless the words say otherwise: 7.5 makes more than 1e-5 of rounding in some tiny pipelines."""
    if name not in tiny.CALM and "--guidance-scale" not in words:
        words = (*words, "--guidance-scale", "3")
    for backend in ("sglang", "diffusers"):
        done = run(name, *words, "--backend", backend, folder=backend, **kwargs)
        assert done.code == 0, done.err
        assert record(backend)["effective"]["backend"] == backend
    assert_same("sglang", "diffusers", len(list(Path("diffusers").glob("*.png"))))


def network_classes() -> set[type]:
    """Our networks of all families."""
    with torch.device("meta"):
        built = [registry.pipeline(spec).build(registry.examples(spec).tiny) for spec in registry.specs()]
    return {type(network) for network in built}


def counted_rows(monkeypatch) -> list[int]:
    """The number of rows of every call of a network, in order."""
    seen: list[int] = []
    for network in network_classes():
        inner = network.forward

        def forward(self, latents, *args, inner=inner):
            if latents.device.type != "meta":  # where shapes are found out
                seen.append(len(latents))
            return inner(self, latents, *args)

        monkeypatch.setattr(network, "forward", forward)
    return seen
