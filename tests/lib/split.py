"""Networks spread over ranks beside the same network in one process: what runs on the ranks of the pool."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.backends.native import vae_parallel
from sglang_gen.dry_run.traffic import trace_encoder
from sglang_gen.engine import attention_kernels
from sglang_gen.engine.cfg import Guidance, guided
from sglang_gen.families import autoencoder as autoencoder
from sglang_gen.families import prediction, text_encoder_parallel, unet_shared
from sglang_gen.families.flux import pipeline
from sglang_gen.families.sd3 import pipeline as sd3
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.models.attention import Attend
from sglang_gen.parallel.collectives import counted
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.sequence import KernelWithLSE, Ring
from sglang_gen.parallel.sequence_boundary import shard
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.parallel.spatial import RowAttention, RowConv, RowDecoder, RowNorm
from sglang_gen.parallel.tensor import RowParallel
from sglang_gen.types import Component
from sglang_gen.weights.load import load

GLUE = {"sd3": sd3, "flux": pipeline, "unet": unet_shared}


def placed(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, summing: bool = True):
    """The network on this rank, and the tensors that it holds by name."""
    glue = GLUE[name]
    split = Split(mesh, glue.TENSOR, glue.SHARDING)
    network = load(partial(glue.build, config), in_folder(folder), glue.sources, dtype, "cpu", split.shrink)
    whole = split.parallelize(network)
    whole.set_kernel(
        scaled_dot_product_attention, attention_kernels.kernel_with_lse("sdpa", "cpu", dtype) if summing else None
    )
    return whole


def _modules(network: nn.Module, kind: type) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, kind)]


def _last_weight(network: nn.Module) -> torch.Tensor:
    """Of the last layer whose inputs are cut."""
    return _modules(network, RowParallel)[-1].layer.weight


def _silent_part(network: nn.Module, mesh: Mesh) -> None:
    if mesh.rank == 1:
        _last_weight(network).zero_()


def _swapped_channels(network: nn.Module, mesh: Mesh) -> None:
    if mesh.rank == 1:
        weight = _last_weight(network)
        weight.copy_(weight.roll(1, 1))


def _bias_twice(network: nn.Module, mesh: Mesh) -> None:
    _modules(network, RowParallel)[0].bias.mul_(2)


def _own_tokens_alone(network: nn.Module, mesh: Mesh) -> None:
    for leaf in _modules(network, Attend):
        leaf.kernel = scaled_dot_product_attention


def _another_order(network: nn.Module, mesh: Mesh) -> None:
    leaf = _modules(network, Attend)[0]
    kernel = leaf.kernel
    leaf.kernel = lambda q, k, v: kernel(q, k.flip(1), v)


def _no_neighbours(network: nn.Module, mesh: Mesh) -> None:
    for conv in _modules(network, RowConv)[:1]:
        conv.conv.padding, conv.forward = (1, 1), conv.conv.forward


def _own_moments(network: nn.Module, mesh: Mesh) -> None:
    for norm in _modules(network, RowNorm)[:1]:
        norm.forward = norm.norm.forward


def _plain_mean(network: nn.Module, mesh: Mesh) -> None:
    """As if the scores of every rank's keys had the same sum."""
    for leaf in _modules(network, Attend):
        if isinstance(leaf.kernel, Ring):
            leaf.kernel.kernel = partial(_without_weight, leaf.kernel.kernel)


def _without_weight(kernel: KernelWithLSE, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    out, lse = kernel(q, k, v)
    return out, torch.zeros_like(lse)


def _own_rows_alone(network: nn.Module, mesh: Mesh) -> None:
    for attention in _modules(network, RowAttention)[:1]:
        attention.forward = attention.attention.forward


def _biases_of_other_heads(network: nn.Module, mesh: Mesh) -> None:
    (weight,) = (value for name, value in network.named_parameters() if "relative_attention_bias" in name)
    weight.copy_(weight.roll(1, 1))


MUTATIONS = {
    "one rank's part of a sum is silent": _silent_part,
    "one rank's channels are in another order": _swapped_channels,
    "a bias is added by both ranks": _bias_twice,
    "attention sees this rank's tokens alone": _own_tokens_alone,
    "heads of keys are in another order": _another_order,
    "a convolution sees no neighbours": _no_neighbours,
    "a norm sees this rank's rows alone": _own_moments,
    "ranks of a ring count alike": _plain_mean,
    "attention of rows sees this rank's rows alone": _own_rows_alone,
    "biases of positions are those of other heads": _biases_of_other_heads,
}


def evaluate(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, latents: Any, conditions: Any,
             steps: tuple[int, ...] = (0,), summing: bool = True, mutation: str | None = None):  # fmt: skip
    """(outputs of the steps, collectives of the last of them)."""
    whole = placed(mesh, name, folder, config, dtype, summing)
    if mutation is not None:
        MUTATIONS[mutation](whole.network, mesh)
    network = whole.entrance
    conditioning = network.condition(*conditions)
    outputs = []
    for step in steps:
        with counted() as traffic:
            outputs.append(network(latents, conditioning, step))
    return torch.stack(outputs), traffic


def in_turn(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, latents: Any, several: Any,
            compiled: str = "") -> list[torch.Tensor]:  # fmt: skip
    """Outputs of two steps, in which conditionings of other lengths take turns; blocks, or all of it, are compiled."""
    whole = placed(mesh, name, folder, config, dtype)
    regions = {"regional": GLUE[name].REGIONS, "full": (type(whole.network),)}.get(compiled, ())
    method = "evaluate" if compiled == "full" else "forward"
    for module in whole.network.modules():
        if isinstance(module, regions):
            function = torch.compile(getattr(module, method), backend="aot_eager", fullgraph=True, dynamic=False)
            setattr(module, method, function)
    conditionings = [whole.entrance.condition(*conditions) for conditions in several]
    try:
        return [whole.entrance(latents, conditioning, step) for step in (0, 2) for conditioning in conditionings]
    finally:
        torch._dynamo.reset()


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


def decode(mesh: Mesh, folder: Path, config: dict, latents: torch.Tensor, mutation: str | None = None):
    """(pictures, what was sent for them, what a rehearsal says is sent) of an autoencoder whose decoder is split."""
    axis, dtype = mesh.axis(SEQUENCE), latents.dtype
    vae = load(partial(autoencoder.build, config), in_folder(folder), autoencoder.sources, dtype, "cpu")
    vae = vae_parallel.split(vae, axis)
    assert isinstance(vae.decoder, RowDecoder)
    if mutation is not None:
        MUTATIONS[mutation](vae.decoder, mesh)
    with counted() as traffic:
        pictures = vae.decode(latents)
    with counted() as predicted:
        vae_parallel.meta_copy(vae, axis, dtype).decode(latents.to("meta"))
    return pictures, traffic, predicted


def read_text(mesh: Mesh, folder: Path, dtype: torch.dtype, tokens: torch.Tensor, mutation: str | None = None):
    """(what T5 makes of the tokens, what was sent for it, what a rehearsal says is sent)."""
    axis = mesh.axis("tp")
    encoder: Any = text_encoder_parallel.read(folder, dtype, "cpu", axis)
    assert text_encoder_parallel.is_sharded(encoder)
    described = Component("transformers", "T5EncoderModel", folder, encoder.config.to_dict())
    predicted = trace_encoder(described, axis, dtype, *tokens.shape)
    if mutation is not None:
        MUTATIONS[mutation](encoder, mesh)
    with counted() as traffic:
        hidden = encoder(tokens).last_hidden_state
    return hidden, traffic, predicted


def by_rows(mesh: Mesh, layer: nn.Module, x: torch.Tensor, rows: tuple[int, ...], last: tuple[int, ...] = ()):
    """What this rank makes of its rows of `[B, C, h, w]` with a convolution or a group norm that is split.

    On the ranks `last` channels are last in memory.
    """
    axis = mesh.axis(SEQUENCE)
    split = RowConv(layer, axis) if isinstance(layer, nn.Conv2d) else RowNorm(layer, axis)
    mine = shard(x, 2, rows, axis.index)
    return split(mine.contiguous(memory_format=torch.channels_last) if axis.index in last else mine)
