"""The door of a network whose sequence is split: each rank takes its share of latents and text, and all the result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.models.attention import Attend
from sglang_gen.parallel.collectives import Axis, gather_along
from sglang_gen.parallel.sequence import Lengths

Kinds = Mapping[str, tuple[int, ...]]  # tokens of every rank in attentions of each kind


@dataclass(frozen=True)
class Sharding:
    """How one kind of network is split.

    `dim` of the latents is cut into multiples of `unit(config)`. `leaves` are the attentions that see split tokens, by
    kind, and `tokens(config, shape of the latents, cut, text)` what every rank has in them, where `cut` and `text` are
    the latents' and the text's lengths on every rank. `share(config, conditioning, arguments of condition, sp axis)`
    is what this rank needs of a conditioning. `spatial` networks are split by rows of their maps, convolutions too.
    """

    dim: int
    unit: Callable[[Any], int]
    leaves: Callable[[Any], Mapping[str, list[Attend]]]
    tokens: Callable[[Any, Sequence[int], Sequence[int], Sequence[int]], Kinds]
    share: Callable[[Any, Any, tuple[Any, ...], Axis], tuple[Any, tuple[int, ...]]]
    spatial: bool = False


def cut(size: int, unit: int, ranks: int) -> tuple[int, ...]:
    """`size` in one part for each rank, as equal as multiples of `unit` can be; what is left over goes to the last."""
    each, more = divmod(size // unit, ranks)
    parts = [unit * (each + (rank < more)) for rank in range(ranks)]
    parts[-1] += size % unit
    return tuple(parts)


def part(x: Tensor, dim: int, lengths: Sequence[int], rank: int) -> Tensor:
    """The part of one rank along `dim`, with strides of its own: compiled code looks at those of a single row too."""
    return x.narrow(dim, sum(lengths[:rank]), lengths[rank]).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Share:
    """A rank's part of a conditioning, and the text tokens that every rank has."""

    conditioning: Any
    text: tuple[int, ...]


class Door:
    """A network as its callers see it, while inside of it this rank has its share of the tokens."""

    def __init__(self, network: nn.Module, sharding: Sharding, axis: Axis, lengths: Mapping[str, Lengths]) -> None:
        """`lengths` are those that the attentions of each kind read."""
        self.network: Any = network
        self.sharding, self.axis, self.lengths = sharding, axis, lengths

    def condition(self, *arguments: Any) -> Share:
        """As the network's own, of which each rank keeps its part."""
        whole = self.network.condition(*arguments)
        return Share(*self.sharding.share(self.network.config, whole, arguments, self.axis))

    def __call__(self, latents: Tensor, share: Share, step: int) -> Tensor:
        return self.forward(latents, share, step)

    def forward(self, latents: Tensor, share: Share, step: int) -> Tensor:
        """As the network's own. Collective."""
        sharding, config = self.sharding, self.network.config
        lengths = cut(latents.shape[sharding.dim], sharding.unit(config), self.axis.size)
        assert all(lengths), f"{latents.shape[sharding.dim]} do not give each of {self.axis.size} ranks a part"
        for kind, tokens in sharding.tokens(config, latents.shape, lengths, share.text).items():
            self.lengths[kind].tokens = tokens
        mine = part(latents, sharding.dim, lengths, self.axis.index)
        return gather_along(self.network(mine, share.conditioning, step), sharding.dim, lengths, self.axis)
