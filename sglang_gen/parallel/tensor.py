"""Tensor parallelism by tables (Shoeybi et al. 2019): each rank holds a shard of a layer's channels.

A table maps layer names to sharding rules. Before loading, `shrink` reduces the layers to this rank's shard and returns
the slice of each tensor to load; after loading, `insert_collectives` adds the all-reduces and all-gathers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.parallel.collectives import Axis, all_reduce, gather


@dataclass(frozen=True)
class Columns:
    """Shard output channels, or a norm's groups. Fused layers shard each of their `sections`, such as q, k and v."""

    sections: tuple[int, ...] = (1,)  # relative widths


@dataclass(frozen=True)
class Rows:
    """Shard input channels; the outputs are partial sums that need an all-reduce."""

    sections: tuple[int, ...] = (1,)


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


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that a rank holds: concatenated ranges of one dimension."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    whole: int  # unsharded length of the dimension


def ranges(whole: int, sections: tuple[int, ...], axis: Axis) -> tuple[tuple[int, int], ...]:
    """This rank's range in each section of a dimension. The plan has checked divisibility."""
    unit, sharded, start = whole // sum(sections), [], 0
    for section in sections:
        length, left = divmod(section * unit, axis.size)
        assert not left, f"{section * unit} channels do not divide by {axis.size}"
        sharded.append((start + axis.index * length, start + (axis.index + 1) * length))
        start += section * unit
    return tuple(sharded)


def matched(network: nn.Module, table: Table) -> list[tuple[str, nn.Module, Any]]:
    """(name, module, rule) of every module that matches a pattern of the table."""
    return [
        (name, module, rule)
        for pattern, rule in table.items()
        for name, module in network.named_modules()
        if fnmatchcase(name, pattern)
    ]


def shrink(network: nn.Module, table: Table, axis: Axis) -> dict[str, Shard]:
    """Shrink the layers of a network on the meta device to this rank's shard; returns the shards by tensor name."""
    shards: dict[str, Shard] = {}
    for name, module, rule in matched(network, table):
        if isinstance(rule, Heads):
            for count in rule.counts:
                setattr(module, count, _per_rank(getattr(module, count), axis))
            continue
        dim = 1 if isinstance(rule, (Rows, Biases)) else 0
        sections = rule.sections if isinstance(rule, (Columns, Rows)) else (1,)
        for key, tensor in list(module.named_parameters(recurse=False)):
            if tensor.ndim <= dim:
                continue  # the bias of a row parallel layer is not sharded; it is added after the all-reduce
            shard = Shard(dim, ranges(tensor.shape[dim], sections, axis), tensor.shape[dim])
            shape = list(tensor.shape)
            shape[dim] //= axis.size
            setattr(module, key, nn.Parameter(tensor.new_empty(shape), requires_grad=False))
            shards[f"{name}.{key}"] = shard
        _count(module, dim, axis)
    return shards


def _count(module: nn.Module, dim: int, axis: Axis) -> None:
    """Divide a layer's attributes that count its channels or groups."""
    kept = ("in_features", "in_channels") if dim else ("out_features", "out_channels", "num_groups", "num_channels")
    for attribute in kept:
        if hasattr(module, attribute):
            setattr(module, attribute, _per_rank(getattr(module, attribute), axis))


def _per_rank(count: int, axis: Axis) -> int:
    """`count` divided by the ranks. The plan has checked divisibility."""
    assert count % axis.size == 0, f"{count} does not divide by {axis.size}"
    return count // axis.size


class RowParallel(nn.Module):
    """A row parallel layer: all-reduces the partial outputs and adds the bias once."""

    def __init__(self, layer: Any, axis: Axis) -> None:
        super().__init__()
        self.bias, layer.bias = layer.bias, None
        self.layer, self.axis, self.of_maps = layer, axis, layer.weight.ndim == 4

    @property
    def weight(self) -> Tensor:
        """The layer's weight; transformers reads its dtype."""
        weight: Tensor = self.layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        total = all_reduce(self.layer(x), self.axis)
        if self.bias is not None:
            total = total + (self.bias[:, None, None] if self.of_maps else self.bias)
        return total


class GatherOutput(nn.Module):
    """A column parallel layer that all-gathers its output channels, the last dimension."""

    def __init__(self, layer: nn.Module, axis: Axis) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(gather(self.layer(x), self.axis).wait().unbind(), dim=-1)


def insert_collectives(network: nn.Module, table: Table, axis: Axis) -> None:
    """Wrap the layers of `Rows` and `Gathered` rules with their collectives."""
    for name, module, rule in matched(network, table):
        if isinstance(rule, (Rows, Gathered)):
            kind = RowParallel if isinstance(rule, Rows) else GatherOutput
            network.set_submodule(name, kind(module, axis))
