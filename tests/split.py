"""Networks spread over ranks beside the same network in one process: what runs on the ranks of the pool."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.backends import decoding
from sglang_gen.engine import kernels
from sglang_gen.engine.guidance import Guidance, guided
from sglang_gen.models.attention import Attend
from sglang_gen.parallel.collectives import counted
from sglang_gen.parallel.door import part
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.spatial import RowConv, RowDecoder, RowNorm
from sglang_gen.parallel.split import Placed, Split
from sglang_gen.parallel.tensor import Summed
from sglang_gen.pipelines import autoencoder, flux, prediction, sd3, unet
from sglang_gen.weight_files import in_folder
from sglang_gen.weights.load import load

GLUE = {"sd3": sd3, "flux": flux, "unet": unet}


def placed(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, summing: bool = True):
    """The network on this rank, and the tensors that it holds by name."""
    glue = GLUE[name]
    split = Split(mesh, glue.TENSOR, glue.SHARDING)
    network = load(partial(glue.build, config), in_folder(folder), glue.sources, dtype, "cpu", split.shrink)
    whole = split.place(network)
    whole.set_kernel(scaled_dot_product_attention, kernels.summing("sdpa", "cpu", dtype) if summing else None)
    return whole


def _modules(whole: Placed, kind: type) -> list[Any]:
    return [module for module in whole.network.modules() if isinstance(module, kind)]


def _last_weight(whole: Placed, mesh: Mesh) -> torch.Tensor:
    """Of the last layer whose inputs are cut."""
    return _modules(whole, Summed)[-1].layer.weight


def _silent_part(whole: Placed, mesh: Mesh) -> None:
    if mesh.rank == 1:
        _last_weight(whole, mesh).zero_()


def _swapped_channels(whole: Placed, mesh: Mesh) -> None:
    if mesh.rank == 1:
        weight = _last_weight(whole, mesh)
        weight.copy_(weight.roll(1, 1))


def _bias_twice(whole: Placed, mesh: Mesh) -> None:
    _modules(whole, Summed)[0].bias.mul_(2)


def _own_tokens_alone(whole: Placed, mesh: Mesh) -> None:
    for leaf in _modules(whole, Attend):
        leaf.kernel = scaled_dot_product_attention


def _another_order(whole: Placed, mesh: Mesh) -> None:
    leaf = _modules(whole, Attend)[0]
    kernel = leaf.kernel
    leaf.kernel = lambda q, k, v: kernel(q, k.flip(1), v)


def _no_neighbours(whole: Placed, mesh: Mesh) -> None:
    for conv in _modules(whole, RowConv)[:1]:
        conv.conv.padding, conv.forward = (1, 1), conv.conv.forward


def _own_moments(whole: Placed, mesh: Mesh) -> None:
    for norm in _modules(whole, RowNorm)[:1]:
        norm.forward = norm.norm.forward


MUTATIONS = {
    "one rank's part of a sum is silent": _silent_part,
    "one rank's channels are in another order": _swapped_channels,
    "a bias is added by both ranks": _bias_twice,
    "attention sees this rank's tokens alone": _own_tokens_alone,
    "heads of keys are in another order": _another_order,
    "a convolution sees no neighbours": _no_neighbours,
    "a norm sees this rank's rows alone": _own_moments,
}


def evaluate(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, latents: Any, conditions: Any,
             steps: tuple[int, ...] = (0,), summing: bool = True, mutation: str | None = None):  # fmt: skip
    """(outputs of the steps, collectives of the last of them)."""
    whole = placed(mesh, name, folder, config, dtype, summing)
    if mutation is not None:
        MUTATIONS[mutation](whole, mesh)
    network = whole.entrance
    conditioning = network.condition(*conditions)
    outputs = []
    for step in steps:
        with counted() as traffic:
            outputs.append(network(latents, conditioning, step))
    return torch.stack(outputs), traffic


def guide(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, latents: Any, conditions: Any,
          negatives: Any) -> torch.Tensor:  # fmt: skip
    """Guided predictions of the first and the last timestep: `negatives` stand for the tensors among `conditions`."""
    network = placed(mesh, name, folder, config, dtype).entrance
    timesteps, *given = conditions
    texts = [value for value in given if isinstance(value, torch.Tensor)]

    def prepare(encoded: Any):
        conditioning = network.condition(timesteps, *prediction.joined(encoded), *given[len(texts) :])
        return lambda latents, index: network(latents, conditioning, index)

    steps = range(len(timesteps))
    predict = guided(prepare, [tuple(negatives), tuple(texts)], Guidance(3.0), steps, mesh.axis("cfg"))
    return torch.stack([predict(latents, index) for index in (steps[0], steps[-1])])


def decode(mesh: Mesh, folder: Path, config: dict, latents: torch.Tensor):
    """(pictures, what was sent for them, what a rehearsal says is sent) of an autoencoder whose decoder is split."""
    axis, dtype = mesh.axis(SEQUENCE), latents.dtype
    vae = load(partial(autoencoder.build, config), in_folder(folder), autoencoder.sources, dtype, "cpu")
    vae = decoding.split(vae, axis)
    assert isinstance(vae.decoder, RowDecoder)
    with counted() as traffic:
        pictures = vae.decode(latents)
    return pictures, traffic, decoding.expected(vae, axis, dtype, len(latents), latents.shape[2:])


def by_rows(mesh: Mesh, layer: nn.Module, x: torch.Tensor, rows: tuple[int, ...]):
    """What this rank makes of its rows of `[B, C, h, w]` with a convolution or a group norm that is split."""
    axis = mesh.axis(SEQUENCE)
    split = RowConv(layer, axis) if isinstance(layer, nn.Conv2d) else RowNorm(layer, axis)
    return split(part(x, 2, rows, axis.index))
