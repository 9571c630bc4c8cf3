"""Tensor parallel T5, the only text encoder that is as large as a denoising network."""

from collections.abc import Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import T5Config, T5EncoderModel

from sglang_gen.families import text_encoders
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.models.layers import WHOLE
from sglang_gen.parallel import tensor
from sglang_gen.parallel.collectives import Axis, Traffic, counted
from sglang_gen.parallel.tensor import Biases, Columns, Heads, Rows
from sglang_gen.types import Component
from sglang_gen.weights import load

TENSOR: tensor.Table = {
    "*.SelfAttention": Heads(("n_heads", "inner_dim")),
    "*.relative_attention_bias": Biases(),
    "*.q": Columns(),
    "*.k": Columns(),
    "*.v": Columns(),
    "*.o": Rows(),
    "*.wi": Columns(),
    "*.wi_0": Columns(),
    "*.wi_1": Columns(),
    "*.wo": Rows(),
}


# Names of the token embedding; a checkpoint has one of them, or both.
EMBEDDING, EMBEDDING_ALIAS = "shared.weight", "encoder.embed_tokens.weight"


class Checkpoint(load.Checkpoint):
    """A T5 checkpoint, whose token embedding is stored under either of two names."""

    def names(self) -> Set[str]:
        return self.place.keys() - ({EMBEDDING_ALIAS} if EMBEDDING in self.place else set())

    def sources(self, name: str) -> dict[str, str]:
        return {EMBEDDING_ALIAS if name == EMBEDDING and EMBEDDING not in self.place else name: WHOLE}


def can_shard(component: Component, dtype: torch.dtype, axis: Axis) -> bool:
    """Whether each rank of the axis holds a shard of this text encoder."""
    return text_encoders.ranks(component, str(dtype).removeprefix("torch."), axis.size) > 1


def is_sharded(network: Any) -> bool:
    """Whether this encoder is a T5 that holds only one rank's shard."""
    if not isinstance(network, T5EncoderModel):
        return False
    attention: Any = network.encoder.block[0].layer[0].SelfAttention
    return bool(attention.n_heads != network.config.num_heads)


def meta_copy(config: T5Config, dtype: torch.dtype, axis: Axis) -> nn.Module:
    """This rank's shard of a T5 with this config, on the meta device."""
    with torch.device("meta"):
        copy = T5EncoderModel(config).to(dtype).eval()
    tensor.shrink(copy, TENSOR, axis)
    tensor.insert_collectives(copy, TENSOR, axis)
    return copy


def meta_shard(component: Component, dtype: torch.dtype, axis: Axis) -> nn.Module:
    """This rank's shard of a text encoder on the meta device."""
    return meta_copy(T5Config.from_dict(dict(component.config)), dtype, axis)


def traffic(component: Component, axis: Axis, dtype: torch.dtype, rows: int, length: int) -> Traffic:
    """Traffic of this rank's shard while it encodes `rows` texts of `length` tokens, traced on meta."""
    tokens = torch.zeros(rows, length, dtype=torch.long, device="meta")
    encoder = meta_shard(component, dtype, axis)
    with torch.no_grad(), counted() as sent:
        encoder(tokens)
    return sent


def read(folder: Path, dtype: torch.dtype, device: str, axis: Axis) -> nn.Module:
    """Load this rank's shard of the encoder in a folder, without the other shards. Raises the errors of `load.fill`."""
    files = in_folder(folder)
    with ExitStack() as stack:
        checkpoint = Checkpoint([stack.enter_context(safe_open(file, framework="pt")) for file in files])
        config = T5Config.from_pretrained(folder)
        return _fill(config, checkpoint, checkpoint.sources, (dtype, device), load.where(files), axis)


def from_tensors(
    component: Component, tensors: load.Tensors, placement: tuple[torch.dtype, str], where: str, axis: Axis
) -> nn.Module:
    """This rank's shard of an encoder whose tensors have its own names. Raises the errors of `load.fill`."""
    config = T5Config.from_dict(dict(component.config))
    return _fill(config, tensors, lambda name: {name: WHOLE}, placement, where, axis)


def _fill(
    config: T5Config,
    tensors: load.Tensors,
    sources: load.Sources,
    placement: tuple[torch.dtype, str],
    where: str,
    axis: Axis,
) -> nn.Module:
    """This rank's shard of an encoder with these tensors, in the dtype and on the device of `placement`.

    Raises the errors of `load.fill`.
    """

    def build() -> nn.Module:
        network: Any = T5EncoderModel(config)
        network.encoder.embed_tokens = None  # tied to `shared`
        return network

    network: Any = load.fill(
        build,
        tensors,
        sources,
        *placement,
        where=where,
        shrink=lambda network: tensor.shrink(network, TENSOR, axis),
    )
    network.encoder.embed_tokens = network.shared
    tensor.insert_collectives(network, TENSOR, axis)
    return network.requires_grad_(False)
