"""Layers shared by several networks.

`Linear`, `Conv2d` and `GroupNorm` own their tensors: they say which tensors a checkpoint must provide, take them, cut
them to one rank's part and compute with them. No other code reads their weights, so a layer may store them in any form.
Without hooks they compute what torch's layers of the same name compute.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]  # name of a layer's tensor -> shape
Widths = dict[str, int]  # name of a section -> its width
WHOLE = ""  # name of the only section of a layer that is not fused


@dataclass(frozen=True)
class Shard:
    """The part of a checkpoint tensor that a layer keeps: concatenated ranges of one dimension."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    whole: int  # length of the dimension in the checkpoint


def cut_sections(sections: Mapping[str, int], rank: int, ranks: int) -> tuple[Widths, tuple[tuple[int, int], ...]]:
    """The widths of the sections on one of `ranks` ranks, and this rank's range of each in the whole dimension.

    The plan has checked that every section divides by the number of ranks.
    """
    widths, ranges, start = {}, [], 0
    for name, width in sections.items():
        mine, left = divmod(width, ranks)
        assert not left, f"{width} channels do not divide by {ranks}"
        widths[name] = mine
        ranges.append((start + rank * mine, start + (rank + 1) * mine))
        start += width
    return widths, tuple(ranges)


def own_tensors(module: nn.Module) -> Shapes:
    """The parameters and saved buffers of a module itself, without its children, by name."""
    values = {**module._parameters, **module._buffers}
    unsaved = module._non_persistent_buffers_set
    return {name: tuple(value.shape) for name, value in values.items() if value is not None and name not in unsaved}


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer `name` of a module itself."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


class OwnTensors(nn.Module):
    """A layer that owns its tensors; by default each is a parameter of the same name and shape."""

    def tensors(self) -> Shapes:
        """The tensors that a checkpoint must provide: this rank's part of them, once the layer is cut."""
        return own_tensors(self)

    def place(self, name: str, tensor: Tensor) -> None:
        """Take the tensor `name`, which has the shape that `tensors` says."""
        place(self, name, tensor)

    def cut(self, dim: int, rank: int, ranks: int) -> dict[str, Shard]:
        """Keep one rank's part of the outputs (`dim` 0) or inputs (`dim` 1), before tensors are placed.

        Returns the shards of the tensors that were cut, by name.
        """
        raise NotImplementedError

    def shrink_tensor(self, name: str, shard: Shard) -> None:
        """Replace the storage of tensor `name` by that of this rank's part, uninitialised."""
        parameter: Tensor = getattr(self, name)
        shape = list(parameter.shape)
        shape[shard.dim] = sum(stop - start for start, stop in shard.ranges)
        self.place(name, parameter.new_empty(shape))


Matmul = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) -> x W^T + b, as F.linear


class Linear(nn.Linear, OwnTensors):
    """y = x W^T + b, where outputs and inputs may be fused sections such as query, key and value.

    `layer(x, only=("k", "v"))` computes these sections alone. `reduce` is set on a row parallel layer, whose product is
    a partial sum: it is applied before the bias is added. `gather` is set on a column parallel layer whose outputs are
    needed on every rank. `matmul` is the implementation of the product.
    """

    reduce: nn.Module | None
    gather: nn.Module | None
    matmul: Matmul

    def __init__(
        self, inputs: int | Mapping[str, int], outputs: int | Mapping[str, int], bias: bool = True, **kwargs: Any
    ) -> None:
        self_inputs = dict(inputs) if isinstance(inputs, Mapping) else {WHOLE: inputs}
        self_outputs = dict(outputs) if isinstance(outputs, Mapping) else {WHOLE: outputs}
        super().__init__(sum(self_inputs.values()), sum(self_outputs.values()), bias, **kwargs)
        self.input_sections, self.sections = self_inputs, self_outputs
        self.reduce = self.gather = None
        self.matmul = F.linear

    def cut(self, dim: int, rank: int, ranks: int) -> dict[str, Shard]:
        sections, whole = (self.input_sections, self.in_features) if dim else (self.sections, self.out_features)
        widths, ranges = cut_sections(sections, rank, ranks)
        shard = Shard(dim, ranges, whole)
        names = [name for name, shape in self.tensors().items() if len(shape) > dim]  # the bias has no inputs
        if dim:
            self.input_sections, self.in_features = widths, whole // ranks
        else:
            self.sections, self.out_features = widths, whole // ranks
        for name in names:
            self.shrink_tensor(name, shard)
        return dict.fromkeys(names, shard)

    def product(self, x: Tensor, rows: slice | None, bias: bool) -> Tensor:
        """x W^T for the outputs in `rows` (None: all), with or without the bias."""
        if rows is None:
            return self.matmul(x, self.weight, self.bias if bias else None)
        return self.matmul(x, self.weight[rows], self.bias[rows] if bias and self.bias is not None else None)

    def forward(self, x: Tensor, only: Sequence[str] = ()) -> Tensor:
        """`[..., inputs]` -> `[..., outputs]`, or the sections `only`, in the order of the layer's sections."""
        parts = [self._rows(x, rows) for rows in self._slices(only)] if only else [self._rows(x, None)]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return y if self.gather is None else self.gather(y)

    def _rows(self, x: Tensor, rows: slice | None) -> Tensor:
        if self.reduce is None:
            return self.product(x, rows, bias=True)
        total: Tensor = self.reduce(self.product(x, rows, bias=False))
        if self.bias is None:
            return total
        return total + (self.bias if rows is None else self.bias[rows])

    def _slices(self, only: Sequence[str]) -> list[slice]:
        """The outputs of these sections; neighbouring sections are one slice."""
        slices: list[slice] = []
        start = 0
        for name, width in self.sections.items():
            if name in only:
                if slices and slices[-1].stop == start:
                    slices[-1] = slice(slices[-1].start, start + width)
                else:
                    slices.append(slice(start, start + width))
            start += width
        return slices

    def split(self, y: Tensor, *groups: Sequence[str]) -> tuple[Tensor, ...]:
        """The outputs `[..., outputs]` as one view for each group of neighbouring sections, which are all of them."""
        assert [name for group in groups for name in group] == [*self.sections], f"{groups} of {self.sections}"
        return torch.split(y, [sum(self.sections[name] for name in group) for group in groups], dim=-1)


class Conv2d(nn.Conv2d, OwnTensors):
    """A convolution. `halo` adds the rows of neighbouring ranks, `reduce` sums the outputs of row parallel ranks."""

    halo: nn.Module | None
    reduce: nn.Module | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.halo = self.reduce = None

    def cut(self, dim: int, rank: int, ranks: int) -> dict[str, Shard]:
        whole = self.in_channels if dim else self.out_channels
        widths, ranges = cut_sections({WHOLE: whole}, rank, ranks)
        names = [name for name, shape in self.tensors().items() if len(shape) > dim]
        shard = Shard(dim, ranges, whole)
        if dim:
            self.in_channels = widths[WHOLE]
        else:
            self.out_channels = widths[WHOLE]
        for name in names:
            self.shrink_tensor(name, shard)
        return dict.fromkeys(names, shard)

    def add_halo(self, halo: nn.Module) -> None:
        """Pad rows by `halo(x)`, which returns `x` with a row above and below, instead of zeros."""
        assert self.kernel_size == (3, 3), self
        self.halo = halo
        self.padding = (0, self.padding[1])  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` -> `[B, C', h', w']`."""
        if self.halo is not None:
            x = self.halo(x)
        if self.reduce is None:
            return super().forward(x)
        total: Tensor = self.reduce(self._conv_forward(x, self.weight, None))
        return total if self.bias is None else total + self.bias[:, None, None]


class GroupNorm(nn.GroupNorm, OwnTensors):
    """A group norm. `moments` merges the mean and variance of this rank's rows with those of other ranks."""

    moments: nn.Module | None

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__(groups, channels, eps)
        self.moments = None

    def cut(self, dim: int, rank: int, ranks: int) -> dict[str, Shard]:
        assert dim == 0, "a norm has no inputs to cut"
        assert self.num_groups % ranks == 0, f"{self.num_groups} groups do not divide by {ranks}"
        widths, ranges = cut_sections({WHOLE: self.num_channels}, rank, ranks)
        names, shard = [*self.tensors()], Shard(0, ranges, self.num_channels)
        self.num_channels, self.num_groups = widths[WHOLE], self.num_groups // ranks
        for name in names:
            self.shrink_tensor(name, shard)
        return dict.fromkeys(names, shard)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, ...]` -> the same shape."""
        if self.moments is None:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        width, inside = self.num_channels // self.num_groups, x.numel() // (len(x) * self.num_groups)
        mean, variance = self.moments(*group_moments(wide, self.num_groups), inside)  # [B, G] each
        scale = torch.rsqrt(variance + self.eps).repeat_interleave(width, dim=1) * weight
        shift = bias - mean.repeat_interleave(width, dim=1) * scale
        expand = (..., *[None] * (x.ndim - 2))
        return torch.addcmul(shift[expand], wide, scale[expand]).to(x.dtype)


def group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance `[B, G]` of the groups of channels of `[B, C, ...]`, by torch's fused group norm.

    On a CPU it is up to twenty times as fast as a reduction over several dimensions. A GPU reduces fast in any memory
    format, and a compiler fuses reductions. In channels_last torch takes the variance as a difference of squares, which
    is inexact where the mean is many deviations from zero, as it is on one process.
    """
    if x.is_cuda or torch.compiler.is_compiling():
        grouped = torch.unflatten(x, 1, (groups, -1))
        variance, mean = torch.var_mean(grouped, dim=tuple(range(2, grouped.ndim)), correction=0)
        return mean, variance
    batch, channels, *inside = x.shape
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        rows = x.movedim(1, 3).flatten(0, 2)  # a batch of one image may have a stride that the fused norm does not take
        x = rows.unflatten(0, (batch, *inside)).movedim(3, 1)
    else:
        x = x.flatten(2).contiguous()
    _, mean, inverse = torch.native_group_norm(x, None, None, batch, channels, math.prod(inside), groups, 0.0)
    return mean, inverse**-2  # of the deviation, which is 0 in a constant group


class Embedding(nn.Embedding, OwnTensors):
    """A table of vectors, which tensor parallelism cuts along the vectors' channels."""

    def cut(self, dim: int, rank: int, ranks: int) -> dict[str, Shard]:
        assert dim == 1, "the rows of a table are not cut"
        widths, ranges = cut_sections({WHOLE: self.embedding_dim}, rank, ranks)
        shard = Shard(1, ranges, self.embedding_dim)
        self.embedding_dim = widths[WHOLE]
        self.shrink_tensor("weight", shard)
        return {"weight": shard}


def adopted(layer: nn.Module) -> OwnTensors:
    """A layer of torch's, such as transformers' networks have, as one that owns its tensors. The tensors are shared."""
    own: OwnTensors
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            own = Linear(layer.in_features, layer.out_features, layer.bias is not None)
        elif isinstance(layer, nn.Embedding):
            own = Embedding(layer.num_embeddings, layer.embedding_dim)
        else:
            raise TypeError(f"{type(layer).__name__} cannot be cut")
    for name, parameter in layer.named_parameters(recurse=False):
        own.place(name, parameter)
    return own.train(layer.training)


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Values `[...]` -> cosines and sines `[..., width]` at geometric frequencies, in float32 (Vaswani et al. 2017)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values[..., None].float() * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    """Linear, SiLU, linear; embeds timesteps, pooled text, guidance and sizes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear, with a hidden width of 4 x `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Modulation(nn.Module):
    """SiLU and a linear layer: `[..., D]` -> `count` modulation vectors `[..., count, D]`."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = Linear(width, count * width)

    def forward(self, vector: Tensor) -> Tensor:
        return rearrange(self.linear(F.silu(vector)), "... (n d) -> ... n d", n=self.count)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift `[B, 1, D]` (Peebles and Xie 2023, adaLN)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
