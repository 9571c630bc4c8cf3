"""Networks spread over ranks beside the same network in one process: what runs on the ranks of the pool."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.backends.native import vae_parallel
from sglang_gen.engine import attention_kernels
from sglang_gen.engine.cfg import Guidance, guided
from sglang_gen.engine.residency import Offloaded, on_device
from sglang_gen.families import autoencoder as autoencoder
from sglang_gen.families import prediction, registry, text_encoder_parallel
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.models.attention import Attend
from sglang_gen.models.chain import Chain
from sglang_gen.models.layers import Linear, Shard
from sglang_gen.parallel.collectives import counted
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.sequence import KernelWithLSE, Ring
from sglang_gen.parallel.sequence_boundary import shard
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.parallel.spatial import Halo, RowAttention, RowDecoder, RowMoments, split_rows
from sglang_gen.parallel.tensor import AllReduce
from sglang_gen.types import Component
from sglang_gen.weights.load import load

FAMILIES = {spec.name: registry.pipeline(spec) for spec in registry.specs()}


class Transposed(Linear):
    """A linear layer that stores its weight transposed and four times as large."""

    stored: nn.Parameter

    def __init__(self, inputs: Any, outputs: Any, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        del self.weight
        self.stored = nn.Parameter(torch.empty(self.in_features, self.out_features), requires_grad=False)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        shapes = {"weight": (self.out_features, self.in_features)}
        return shapes if self.bias is None else {**shapes, "bias": (self.out_features,)}

    def place(self, name: str, tensor: torch.Tensor) -> None:
        if name == "weight":
            self.stored = nn.Parameter(4 * tensor.T.contiguous(), requires_grad=False)
        else:
            super().place(name, tensor)

    def shrink_tensor(self, name: str, shard: Shard) -> None:
        if name == "weight":
            self.stored = nn.Parameter(self.stored.new_empty(self.in_features, self.out_features), requires_grad=False)
        else:
            super().shrink_tensor(name, shard)

    def product(self, x: torch.Tensor, rows: slice | None, bias: bool) -> torch.Tensor:
        rows = rows or slice(None)
        y = x @ self.stored[:, rows] / 4
        return y + self.bias[rows] if bias and self.bias is not None else y


def transposed(network: nn.Module) -> nn.Module:
    """The network with every linear layer replaced."""
    for name, module in list(network.named_modules()):
        if type(module) is Linear:
            made = Transposed(module.input_sections, module.sections, module.bias is not None)
            network.set_submodule(name, made)
    return network


@dataclass(frozen=True)
class Changes:
    """Changes to the network: blocks that are left out, compiled blocks, layers of another storage, offloading."""

    skipped: range | None = None
    compiled: bool = False
    stored: bool = False
    offloaded: bool = False


def placed(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, summing: bool = True,
           stored: bool = False):  # fmt: skip
    """The network on this rank, and the tensors that it holds by name."""
    family = FAMILIES[name]
    split = Split(mesh, family.tensor_parallel, family.sharding)
    build = (lambda: transposed(family.build(config))) if stored else partial(family.build, config)
    network = load(build, in_folder(folder), family.sources, dtype, "cpu", split.shrink)
    whole = split.parallelize(network)
    whole.set_kernel(
        scaled_dot_product_attention, attention_kernels.kernel_with_lse("sdpa", "cpu", dtype) if summing else None
    )
    return whole


def _modules(network: nn.Module, kind: type) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, kind)]


def _row_parallel(network: nn.Module) -> list[Any]:
    """Layers whose inputs are cut."""
    return [module for module in network.modules() if isinstance(getattr(module, "reduce", None), AllReduce)]


def _last_weight(network: nn.Module) -> torch.Tensor:
    return _row_parallel(network)[-1].weight


def _silent_part(network: nn.Module, mesh: Mesh) -> None:
    if mesh.rank == 1:
        _last_weight(network).zero_()


def _swapped_channels(network: nn.Module, mesh: Mesh) -> None:
    if mesh.rank == 1:
        weight = _last_weight(network)
        weight.copy_(weight.roll(1, 1))


def _bias_twice(network: nn.Module, mesh: Mesh) -> None:
    _row_parallel(network)[0].bias.mul_(2)


def _own_tokens_alone(network: nn.Module, mesh: Mesh) -> None:
    for leaf in _modules(network, Attend):
        leaf.kernel = scaled_dot_product_attention


def _another_order(network: nn.Module, mesh: Mesh) -> None:
    leaf = _modules(network, Attend)[0]
    kernel = leaf.kernel
    leaf.kernel = lambda q, k, v: kernel(q, k.flip(1), v)


def _no_neighbours(network: nn.Module, mesh: Mesh) -> None:
    for conv in [module for module in network.modules() if isinstance(getattr(module, "halo", None), Halo)][:1]:
        conv.halo, conv.padding = None, (1, 1)


def _own_moments(network: nn.Module, mesh: Mesh) -> None:
    for norm in [module for module in network.modules() if isinstance(getattr(module, "moments", None), RowMoments)][
        :1
    ]:
        norm.moments = None


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


UNCHANGED = Changes()


class Skipping(Chain):
    """A chain that leaves blocks out."""

    def __init__(self, skipped: range) -> None:
        super().__init__()
        self.skipped = skipped

    def forward(self, blocks: Any, state: Any, conditions: Any, *shared: Any) -> Any:
        kept = [index for index in range(len(blocks)) if index not in self.skipped]
        return super().forward([blocks[index] for index in kept], state, [conditions[index] for index in kept], *shared)


def evaluate(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, latents: Any, conditions: Any,
             steps: tuple[int, ...] = (0,), summing: bool = True, mutation: str | None = None,
             changes: Changes = UNCHANGED):  # fmt: skip
    """(outputs of the steps, collectives of the last of them)."""
    whole = placed(mesh, name, folder, config, dtype, summing, changes.stored)
    if changes.skipped is not None:
        whole.network.chain = Skipping(changes.skipped)
    if changes.compiled:
        from sglang_gen.engine.compile import Compiled

        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # of a class of blocks, which a run sets by the shapes it expects
        Compiled(whole.network, FAMILIES[name].regions, "cpu", mesh.layout.ranks)
    if mutation is not None:
        MUTATIONS[mutation](whole.network, mesh)
    network = whole.entrance
    parts = [Offloaded(whole.network, "cpu")] if changes.offloaded else []
    for place, name, master in (entry for each in parts for entry in each.plain):
        place[name].data = torch.full_like(master, torch.nan)  # where a GPU would not find it
    outputs = []
    with on_device(parts):
        conditioning = network.condition(*conditions)
        for step in steps:
            with counted() as traffic:
                outputs.append(network(latents, conditioning, step))
    return torch.stack(outputs), traffic


def in_turn(mesh: Mesh, name: str, folder: Path, config: dict, dtype: torch.dtype, latents: Any, several: Any,
            compiled: str = "") -> list[torch.Tensor]:  # fmt: skip
    """Outputs of two steps, in which conditionings of other lengths take turns; blocks, or all of it, are compiled."""
    whole = placed(mesh, name, folder, config, dtype)
    regions = {"regional": FAMILIES[name].regions, "full": (type(whole.network),)}.get(compiled, ())
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
    """(what the text encoder makes of the tokens, what was sent for it, what a rehearsal says is sent)."""
    axis = mesh.axis("tp")
    encoder: Any = text_encoder_parallel.read(folder, dtype, "cpu", axis)
    assert text_encoder_parallel.is_sharded(encoder)
    described = Component("transformers", type(encoder).__name__, folder, encoder.config.to_dict())
    predicted = text_encoder_parallel.traffic(described, axis, dtype, *tokens.shape)
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
    split_rows(layer, axis)
    mine = shard(x, 2, rows, axis.index)
    return layer(mine.contiguous(memory_format=torch.channels_last) if axis.index in last else mine)
