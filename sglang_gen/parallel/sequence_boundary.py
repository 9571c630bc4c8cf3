"""Where a sequence parallel network is entered and left: latents and text are sharded, the prediction is gathered."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.models.attention import Attend
from sglang_gen.parallel.collectives import Axis, gather_along
from sglang_gen.parallel.sequence import CurrentLengths

TokensByKind = Mapping[str, tuple[int, ...]]  # kind of attention -> tokens of every rank


@dataclass(frozen=True)
class Sharding:
    """How a network is sharded for sequence parallelism.

    The latents are sharded along `dim` in multiples of `unit(config)`. `attention_ops(network)` are the attention ops
    over sharded tokens, by kind. `tokens(config, latents' shape, latents' lengths, text lengths)` is the number of
    tokens of every rank in each kind; both lengths are per rank. `shard_conditioning(config, conditioning, arguments of
    condition, sp axis)` is this rank's conditioning and the text lengths of all ranks. `spatial` networks are sharded
    by the rows of their feature maps, convolutions included.
    """

    dim: int
    unit: Callable[[Any], int]
    attention_ops: Callable[[Any], Mapping[str, list[Attend]]]
    tokens: Callable[[Any, Sequence[int], Sequence[int], Sequence[int]], TokensByKind]
    shard_conditioning: Callable[[Any, Any, tuple[Any, ...], Axis], tuple[Any, tuple[int, ...]]]
    spatial: bool = False


def shard_sizes(size: int, unit: int, ranks: int) -> tuple[int, ...]:
    """Length of every rank's shard of `size`, balanced in multiples of `unit`; the remainder goes to the last rank."""
    units, extra = divmod(size // unit, ranks)
    sizes = [unit * (units + (rank < extra)) for rank in range(ranks)]
    sizes[-1] += size % unit
    return tuple(sizes)


def shard(x: Tensor, dim: int, lengths: Sequence[int], rank: int) -> Tensor:
    """A contiguous copy of one rank's shard along `dim`; compiled code guards on the strides of a single row too."""
    return x.narrow(dim, sum(lengths[:rank]), lengths[rank]).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class ShardedConditioning:
    """This rank's shard of a conditioning, and the number of text tokens on every rank."""

    conditioning: Any
    text: tuple[int, ...]


class SequenceBoundary:
    """Has the interface of the unsharded network, and runs the network on this rank's shard of the tokens."""

    def __init__(
        self, network: nn.Module, sharding: Sharding, axis: Axis, lengths: Mapping[str, CurrentLengths]
    ) -> None:
        """`lengths` are what the attention ops of each kind read."""
        self.network: Any = network
        self.sharding, self.axis, self.lengths = sharding, axis, lengths

    def condition(self, *arguments: Any) -> ShardedConditioning:
        """The network's `condition`, of which each rank keeps its shard."""
        whole = self.network.condition(*arguments)
        return ShardedConditioning(*self.sharding.shard_conditioning(self.network.config, whole, arguments, self.axis))

    def __call__(self, latents: Tensor, sharded: ShardedConditioning, step: int) -> Tensor:
        return self.forward(latents, sharded, step)

    def forward(self, latents: Tensor, sharded: ShardedConditioning, step: int) -> Tensor:
        """The network's `forward`, with latents and result of full size. Collective."""
        sharding, config = self.sharding, self.network.config
        lengths = shard_sizes(latents.shape[sharding.dim], sharding.unit(config), self.axis.size)
        assert all(lengths), f"{latents.shape[sharding.dim]} do not give each of {self.axis.size} ranks a shard"
        mine = shard(latents, sharding.dim, lengths, self.axis.index)
        with ExitStack() as evaluation:
            for kind, tokens in sharding.tokens(config, latents.shape, lengths, sharded.text).items():
                evaluation.enter_context(self.lengths[kind].of(tokens))
            prediction = self.network(mine, sharded.conditioning, step)
        return gather_along(prediction, sharding.dim, lengths, self.axis)
