"""Networks spread over ranks beside the same network in one process: what runs on the ranks of the pool."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.engine import kernels
from sglang_gen.parallel.collectives import counted
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.split import Split
from sglang_gen.pipelines import flux, sd3, unet
from sglang_gen.weights.load import load, weight_files

GLUE = {"sd3": sd3, "flux": flux, "unet": unet}


def placed(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, summing: bool = True):
    """The network on this rank, and the tensors that it holds by name."""
    glue = GLUE[name]
    split = Split(mesh, glue.TENSOR, glue.SHARDING)
    network = load(partial(glue.build, config), weight_files(folder), glue.sources, dtype, "cpu", split.shrink)
    whole = split.place(network)
    whole.set_kernel(scaled_dot_product_attention, kernels.summing("sdpa", "cpu", dtype) if summing else None)
    return whole


def evaluate(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, latents: Any, conditions: Any,
             steps: tuple[int, ...] = (0,), summing: bool = True):  # fmt: skip
    """(outputs of the steps, collectives of the last of them)."""
    network = placed(mesh, name, folder, config, dtype, summing).entrance
    conditioning = network.condition(*conditions)
    outputs = []
    for step in steps:
        with counted() as traffic:
            outputs.append(network(latents, conditioning, step))
    return torch.stack(outputs), traffic
