"""Tensor parallelism by tables (Shoeybi et al. 2019): each rank holds a shard of a layer's channels.

A table maps layer names to sharding rules. Before loading, `shrink` lets each layer cut itself to this rank's shard and
returns the slice of each tensor to load; after loading, `insert_collectives` adds the all-reduces and all-gathers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.models.layers import OwnTensors, Shard, adopted
from sglang_gen.parallel.collectives import Axis, all_reduce, gather


@dataclass(frozen=True)
class Columns:
    """Shard output channels, or a norm's groups; a fused layer shards each of its sections, such as q, k and v."""


@dataclass(frozen=True)
class Rows:
    """Shard input channels, of every section; the outputs are partial sums that need an all-reduce."""


@dataclass(frozen=True)
class Gathered:
    """Shard output channels and all-gather the output: only the weights stay sharded."""


@dataclass(frozen=True)
class Heads:
    """Divide a module's attributes that count attention heads or their channels."""

    counts: tuple[str, ...] = ("heads",)


@dataclass(frozen=True)
class Biases:
    """Shard a table of biases per head, `[N, heads]`, along its heads."""


Table = Mapping[str, Columns | Rows | Gathered | Heads | Biases]  # patterns of module names


def matched(network: nn.Module, table: Table) -> list[tuple[str, nn.Module, Any]]:
    """(name, module, rule) of every module that matches a pattern of the table."""
    return [
        (name, module, rule)
        for pattern, rule in table.items()
        for name, module in network.named_modules()
        if fnmatchcase(name, pattern)
    ]


def shrink(network: nn.Module, table: Table, axis: Axis) -> dict[str, Shard]:
    """Cut the layers of a network on the meta device to this rank's shard; returns the shards by tensor name."""
    shards: dict[str, Shard] = {}
    for name, module, rule in matched(network, table):
        if isinstance(rule, Heads):
            for count in rule.counts:
                setattr(module, count, _per_rank(getattr(module, count), axis))
            continue
        if not isinstance(module, OwnTensors):
            module = adopted(module)
            network.set_submodule(name, module)
        dim = 1 if isinstance(rule, (Rows, Biases)) else 0
        shards |= {f"{name}.{key}": shard for key, shard in module.cut(dim, axis.index, axis.size).items()}
    return shards


def _per_rank(count: int, axis: Axis) -> int:
    """`count` divided by the ranks. The plan has checked divisibility."""
    assert count % axis.size == 0, f"{count} does not divide by {axis.size}"
    return count // axis.size


class AllReduce(nn.Module):
    """Sums the partial outputs of a row parallel layer over the ranks."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.axis)


class AllGather(nn.Module):
    """Gathers the output channels of a column parallel layer, the last dimension, from all ranks."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(gather(x, self.axis).wait().unbind(), dim=-1)


def insert_collectives(network: nn.Module, table: Table, axis: Axis) -> None:
    """Set the collectives on the layers of `Rows` and `Gathered` rules."""
    for _, module, rule in matched(network, table):
        layer: Any = module
        if isinstance(rule, Rows):
            layer.reduce = AllReduce(axis)
        elif isinstance(rule, Gathered):
            layer.gather = AllGather(axis)
