"""Weights are in memory once: the peak of anonymous memory while the native engine loads a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

WIDTH, TEXT = 1024, 512
# Freed memory returns to the kernel at once, so that one measurement does not depend on what the last one left.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
# Loads the tiny model first, so that what is imported and kept by libraries is there before the measurement.
LOAD = """
import gc, json, sys
from pathlib import Path
import torch
from sglang_gen import log
from sglang_gen.backends.native import build, components
from sglang_gen.backends.native import engine as native
from sglang_gen.families import registry
from sglang_gen.hub import resolve
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.memory import Memory, host_anon_mb
from sglang_gen.plan.make import make_plan
from sglang_gen.types import Layout

PLACES = {"whole": None, "rank 0 of 2": 0, "rank 1 of 2": 1}

def load(path, rank):
    run = compose(Choices((f"model.path={path}", "sampling.prompt=a", "dtype=bfloat16", "backend=sglang")))
    plan = make_plan(run, resolve.find(run.run.model, weights=True))
    if rank is None:
        engine = native.load(plan, Mesh(), CallLog())
        return engine.network, engine.components
    family = registry.pipeline(registry.by_pipeline_class(plan.card.pipeline_class))
    mesh = Mesh(Layout(tp=2), rank)
    return build.build(plan, mesh).network, components.read_components(plan, family, mesh)  # what that rank reads

log.setup("error")
for rank in PLACES.values():
    load(sys.argv[1], rank)
gc.collect()
found = {}
for path, (place, rank) in ((path, place) for path in sys.argv[2:] for place in PLACES.items()):
    before = host_anon_mb()
    with Memory("cpu") as memory:
        network, others = load(path, rank)
        peak = memory.checkpoint().peak_host_anon_mb
    modules = [network, *(part for part in others.values() if isinstance(part, torch.nn.Module))]
    weights = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values()) / 2**20
    dtypes = {str(tensor.dtype) for module in modules for tensor in module.state_dict().values()}
    found[f"{Path(path).name}, {place}"] = {"peak": peak - before, "weights": weights, "dtypes": sorted(dtypes)}
    del network, others, modules
    gc.collect()
print(json.dumps(found))
"""


def write(folder: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, stem: str, shards: int) -> None:
    """Random weights of these shapes, over as many files of like size, with their index."""
    names, places = sorted(shapes), {}
    numbers = torch.rand(max(shape.numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(0))
    numbers = numbers.to(dtype)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for index in range(shards):
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        tensors = {name: numbers[: shapes[name].numel()].clone().view(shapes[name]) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


BIG = {
    "flux": {"num_attention_heads": WIDTH // 128, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56],
             "joint_attention_dim": TEXT, "num_layers": 2, "num_single_layers": 3},
    "sd3": {"num_attention_heads": WIDTH // 64, "attention_head_dim": 64, "caption_projection_dim": WIDTH,
            "joint_attention_dim": TEXT, "num_layers": 4},
    "sdxl": {"block_out_channels": [256, 512], "attention_head_dim": [4, 8]},
}  # fmt: skip
NETWORKS = {"flux": FluxTransformer2DModel, "sd3": SD3Transformer2DModel, "sdxl": UNet2DConditionModel}
T5 = {"flux": "text_encoder_2", "sd3": "text_encoder_3"}
LEAST = {"flux": 300, "sd3": 200, "sdxl": 100}  # MB
MOST = {"flux": 1.05, "sd3": 1.05, "sdxl": 1.1}  # one convolution of this small UNet is 4 % of it


def shapes_of(build, *config: object) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build(*config).state_dict().items()}


def big(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """The tiny pipeline with a large network and, where it has one, a T5 of 43 M numbers, as a folder of shards."""
    tiny.BUILDERS[name](folder)
    part = folder / ("unet" if name == "sdxl" else "transformer")
    network = NETWORKS[name].load_config(part) | BIG[name]
    shapes = shapes_of(NETWORKS[name].from_config, network)
    (part / "config.json").write_text(json.dumps(dict(network)))
    write(part, shapes, dtype, "diffusion_pytorch_model", 3)
    if name in T5:
        config = T5Config.from_pretrained(folder / T5[name])
        for key, value in {"d_model": TEXT, "d_kv": 64, "num_heads": 8, "d_ff": 4096, "num_layers": 8}.items():
            setattr(config, key, value)
        shapes = shapes_of(T5EncoderModel, config)
        del shapes["encoder.embed_tokens.weight"]  # the same as shared.weight
        config.save_pretrained(folder / T5[name])
        write(folder / T5[name], shapes, dtype, "model", 2)
    return folder


def measured(name: str, small: Path, folder: Path) -> dict[str, dict]:
    folders = [big(name, folder / stored, getattr(torch, stored)) for stored in ("float32", "bfloat16")]
    command = [sys.executable, "-c", LOAD, small, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | RETURN_FREED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # networks of hundreds of MB
@pytest.mark.parametrize("name", BIG)
def test_loading_needs_no_more_anonymous_memory_than_the_weights_in_the_target_dtype(pipelines, tmp_path, name):
    all_found = measured(name, pipelines[name], tmp_path)
    places = ("whole", "rank 0 of 2", "rank 1 of 2")
    assert set(all_found) == {f"{stored}, {place}" for stored in ("float32", "bfloat16") for place in places}
    for stored, found in all_found.items():
        assert found["dtypes"] == ["torch.bfloat16"], stored
        assert LEAST[name] / (1 if stored.endswith("whole") else 2) < found["weights"] < 600, stored
        assert found["peak"] <= MOST[name] * found["weights"], (stored, found)
    one, *halves = converted = [all_found[f"float32, {place}"] for place in places]
    for found in converted:  # the measurement sees the weights
        assert found["peak"] > 0.8 * found["weights"]
    for half in halves:  # some small layers, and the table of words, are every rank's
        assert half["weights"] < 0.56 * one["weights"]
