"""Tensor parallelism by tables (Shoeybi et al. 2019): each rank holds some of a layer's channels.

A table names layers and says how each is cut. Before loading, `shrink` makes the layers as small as this rank's part
and says which slice of each tensor belongs there; after loading, `join` adds what makes whole results of the parts.
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
    """Output channels are cut; each of several `sections` by itself, as query, key and value are. A norm's groups."""

    sections: tuple[int, ...] = (1,)  # widths in proportion


@dataclass(frozen=True)
class Rows:
    """Input channels are cut, so that the outputs are parts of a sum."""

    sections: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Gathered:
    """Output channels are cut and put together behind the layer: only its weights are shared out."""


@dataclass(frozen=True)
class Heads:
    """A module that counts attention heads, or channels of all of them, has its part."""

    counts: tuple[str, ...] = ("heads",)


@dataclass(frozen=True)
class Biases:
    """A table of numbers for each head, `[N, heads]`, is cut along its heads."""


Table = Mapping[str, Columns | Rows | Gathered | Heads | Biases]  # patterns of module names


@dataclass(frozen=True)
class Part:
    """The part of a tensor that a rank holds: ranges of one dimension, one after the other."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    whole: int  # length of the dimension in the checkpoint


def ranges(whole: int, sections: tuple[int, ...], axis: Axis) -> tuple[tuple[int, int], ...]:
    """This rank's part of each section of a dimension. The plan has seen to it that they divide."""
    unit, found, start = whole // sum(sections), [], 0
    for section in sections:
        length, left = divmod(section * unit, axis.size)
        assert not left, f"{section * unit} channels do not divide by {axis.size}"
        found.append((start + axis.index * length, start + (axis.index + 1) * length))
        start += section * unit
    return tuple(found)


def matched(network: nn.Module, table: Table) -> list[tuple[str, nn.Module, Any]]:
    """(name, module, rule) of every module that a pattern of the table names."""
    return [
        (name, module, rule)
        for pattern, rule in table.items()
        for name, module in network.named_modules()
        if fnmatchcase(name, pattern)
    ]


def shrink(network: nn.Module, table: Table, axis: Axis) -> dict[str, Part]:
    """Cut the layers of a network on meta down to this rank's part; the parts by the names of their tensors."""
    parts: dict[str, Part] = {}
    for name, module, rule in matched(network, table):
        if isinstance(rule, Heads):
            for count in rule.counts:
                setattr(module, count, _share(getattr(module, count), axis))
            continue
        dim = 1 if isinstance(rule, (Rows, Biases)) else 0
        sections = rule.sections if isinstance(rule, (Columns, Rows)) else (1,)
        for key, tensor in list(module.named_parameters(recurse=False)):
            if tensor.ndim <= dim:
                continue  # the bias of a sum is added once, whole
            part = Part(dim, ranges(tensor.shape[dim], sections, axis), tensor.shape[dim])
            shape = list(tensor.shape)
            shape[dim] //= axis.size
            setattr(module, key, nn.Parameter(tensor.new_empty(shape), requires_grad=False))
            parts[f"{name}.{key}"] = part
        _count(module, dim, axis)
    return parts


def _count(module: nn.Module, dim: int, axis: Axis) -> None:
    """The numbers that a layer keeps of its own channels."""
    kept = ("in_features", "in_channels") if dim else ("out_features", "out_channels", "num_groups", "num_channels")
    for attribute in kept:
        if hasattr(module, attribute):
            setattr(module, attribute, _share(getattr(module, attribute), axis))


def _share(count: int, axis: Axis) -> int:
    """One rank's part of a number. The plan has seen to it that it divides."""
    assert count % axis.size == 0, f"{count} does not divide by {axis.size}"
    return count // axis.size


class Summed(nn.Module):
    """A layer whose ranks each see a part of its inputs: the sum of their outputs, and the bias once."""

    def __init__(self, layer: Any, axis: Axis) -> None:
        super().__init__()
        self.bias, layer.bias = layer.bias, None
        self.layer, self.axis, self.of_maps = layer, axis, layer.weight.ndim == 4

    @property
    def weight(self) -> Tensor:
        """Of the layer: transformers looks at its dtype."""
        found: Tensor = self.layer.weight
        return found

    def forward(self, x: Tensor) -> Tensor:
        total = all_reduce(self.layer(x), self.axis)
        if self.bias is not None:
            total = total + (self.bias[:, None, None] if self.of_maps else self.bias)
        return total


class Whole(nn.Module):
    """A layer whose ranks each give a part of its output channels, the last dimension: all of them."""

    def __init__(self, layer: nn.Module, axis: Axis) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(gather(self.layer(x), self.axis).wait().unbind(), dim=-1)


def join(network: nn.Module, table: Table, axis: Axis) -> None:
    """Put the collectives of the table's rules behind the layers."""
    for name, module, rule in matched(network, table):
        if isinstance(rule, (Rows, Gathered)):
            kind = Summed if isinstance(rule, Rows) else Whole
            network.set_submodule(name, kind(module, axis))
