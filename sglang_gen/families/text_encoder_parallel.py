"""T5 over the ranks of a tensor parallel group: the one text encoder that is as large as a denoising network."""

from collections.abc import Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import T5Config, T5EncoderModel

from sglang_gen.hub.component_folder import in_folder
from sglang_gen.parallel import tensor
from sglang_gen.parallel.collectives import Axis, Traffic, counted
from sglang_gen.parallel.tensor import Biases, Columns, Heads, Rows
from sglang_gen.plan.layout_limits import encoder_ranks
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


WORDS, ALIAS = "shared.weight", "encoder.embed_tokens.weight"  # of the table of words; files have one, or both


class Checkpoint(load.Checkpoint):
    """The tensors of T5, of which the table of words has one name or another."""

    def names(self) -> Set[str]:
        return self.place.keys() - ({ALIAS} if WORDS in self.place else set())

    def sources(self, name: str) -> list[str]:
        return [ALIAS] if name == WORDS and WORDS not in self.place else [name]


def divides(component: Component, dtype: torch.dtype, axis: Axis) -> bool:
    """Whether each rank of a tensor parallel group holds a shard of this text encoder."""
    return encoder_ranks(component, str(dtype).removeprefix("torch."), axis.size) > 1


def is_part(network: Any) -> bool:
    """Whether a T5 is one rank's part."""
    if not isinstance(network, T5EncoderModel):
        return False
    attention: Any = network.encoder.block[0].layer[0].SelfAttention
    return bool(attention.n_heads != network.config.num_heads)


def twin(network: Any, dtype: torch.dtype, axis: Axis) -> nn.Module:
    """This rank's part of a T5 like this one, without memory."""
    with torch.device("meta"):
        found = type(network)(network.config).to(dtype).eval()
    tensor.shrink(found, TENSOR, axis)
    tensor.join(found, TENSOR, axis)
    return found


def expected(network: Any, dtype: torch.dtype, axis: Axis, rows: int, length: int) -> Traffic:
    """What this rank's part will send while it reads `rows` texts of `length` tokens."""
    tokens = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with torch.no_grad(), counted() as sent:
        twin(network, dtype, axis)(tokens)
    return sent


def read(folder: Path, dtype: torch.dtype, device: str, axis: Axis) -> nn.Module:
    """This rank's part of the encoder in a folder, of which nothing else is read. Raises UserError as `load` does."""
    files = in_folder(folder)

    def build() -> nn.Module:
        network: Any = T5EncoderModel(T5Config.from_pretrained(folder))
        network.encoder.embed_tokens = None  # the same table as `shared`
        return network

    with ExitStack() as stack:
        checkpoint = Checkpoint([stack.enter_context(safe_open(file, framework="pt")) for file in files])
        network: Any = load.fill(
            build,
            checkpoint,
            sources=checkpoint.sources,
            dtype=dtype,
            device=device,
            where=load.where(files),
            shrink=lambda network: tensor.shrink(network, TENSOR, axis),
        )
    network.encoder.embed_tokens = network.shared
    tensor.join(network, TENSOR, axis)
    return network.requires_grad_(False)
