"""The family of `moving_family` in this process and on the ranks of the pool, and its model."""

import importlib
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from moving_family.pipeline import PIPELINE
from moving_family.spec import SPEC
from safetensors.torch import save_file

from sglang_gen import log
from sglang_gen.families import registry
from sglang_gen.launch import rank
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Plan, Result

CONFIG = {"in_channels": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "text_width": 32}
BOUNDARY = 0.6  # of the timesteps


def register(patch: pytest.MonkeyPatch) -> None:
    """Let the registry find the family, until the patch is undone."""
    known, module = registry.specs(), registry._module

    def found(family: str, name: str) -> Any:
        return importlib.import_module(f"moving_family.{name}") if family == SPEC.name else module(family, name)

    patch.setattr(registry, "specs", lambda: (*known, SPEC))
    patch.setattr(registry, "_module", found)


def save_model(folder: Path, source: Path, networks: int = 2) -> Path:
    """A model with so many denoising networks; its other components are those of the tiny pipeline `source`."""
    index = json.loads((source / "model_index.json").read_text())
    kept = {name: index[name] for name in ("text_encoder", "tokenizer", "vae")}
    folder.mkdir()
    for name in kept:
        (folder / name).symlink_to(source / name)
    pipeline = PIPELINE(SPEC)
    for number, name in enumerate(SPEC.networks[:networks]):
        network = tiny.fill(pipeline.build(CONFIG), 81 + number)
        write(folder / name, "config.json", {"_class_name": "MovingTransformer", **CONFIG})
        save_file(checkpoint(network), folder / name / "diffusion_pytorch_model.safetensors")
        kept[name] = ["diffusers", "MovingTransformer"]
    write(folder / "scheduler", "scheduler_config.json", {"_class_name": SCHEDULER, "shift": 3.0})
    boundary = {"boundary_ratio": BOUNDARY} if networks > 1 else {}
    kept["scheduler"] = ["diffusers", SCHEDULER]
    write(folder, "model_index.json", {"_class_name": SPEC.pipeline_class, **kept, **boundary})
    return folder


SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def write(folder: Path, name: str, content: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def checkpoint(network: Any) -> dict[str, Any]:
    """The network's tensors under the names of its checkpoint; fused projections are apart there."""
    pipeline, tensors = PIPELINE(SPEC), {}
    for name, tensor in network.state_dict().items():
        sources = list(pipeline.sources(name))
        tensors.update(zip(sources, (part.contiguous() for part in tensor.chunk(len(sources))), strict=True))
    return tensors


def carry_out(mesh: Mesh, plan: Plan, folder: str) -> Result | None:
    """What a rank's process does with a plan."""
    os.chdir(folder)
    log.setup("error")
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        return rank.run(plan, mesh, time.perf_counter())


class OnPool:
    """The pool in place of the launcher's rank processes."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    @contextmanager
    def open(self, count: int, device: str):
        yield self

    def run(self, plan: Plan, started: float) -> Result:
        return self.pool.run(plan.layout, carry_out, plan, os.getcwd())[0]
