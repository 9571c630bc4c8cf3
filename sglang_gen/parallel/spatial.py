"""Exact spatial parallelism of convolutional networks: each rank holds some rows of every feature map.

Consecutive rows are consecutive tokens, so attention is sharded as in sequence parallelism. A 3 x 3 convolution takes
one halo row from each neighbouring rank, a group norm merges the moments of all ranks.
"""

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sglang_gen.models.attention import Attend
from sglang_gen.models.unet import SelfAttention
from sglang_gen.parallel.collectives import (
    Axis,
    exchange,
    finish_gather_along,
    gather,
    gather_along,
    start_gather_along,
)
from sglang_gen.parallel.sequence import AnyLengths, CurrentLengths, Gathering
from sglang_gen.parallel.sequence_boundary import shard, shard_sizes


class RowConv(nn.Module):
    """A 3 x 3 convolution with padding 1 whose halo rows are on neighbouring ranks.

    With stride 2 a shard begins at an even row, so the row below it is never read.
    """

    def __init__(self, conv: nn.Conv2d, axis: Axis) -> None:
        super().__init__()
        self.conv, self.axis, self.below = conv, axis, conv.stride[0] == 1
        conv.padding = (0, conv.padding[1])  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        above, below = neighbours(x, self.axis, self.below)
        out: Tensor = self.conv(torch.cat([above, x, below], dim=2))
        return out


def neighbours(x: Tensor, axis: Axis, below: bool) -> tuple[Tensor, Tensor]:
    """The rows `[B, C, 1, w]` above and below this rank's `[B, C, h, w]`; zeros at the border, or if not `below`.

    Rows are sent channels last, regardless of each rank's memory format, and returned in this rank's format.
    """
    index, last = axis.index, axis.size - 1
    first, final = x[:, :, :1], x[:, :, -1:]
    zeros = torch.zeros_like(first)
    sent, received = [0] * axis.size, [0] * axis.size
    if index > 0:
        received[index - 1], sent[index - 1] = first.numel(), first.numel() if below else 0
    if index < last:
        sent[index + 1], received[index + 1] = first.numel(), first.numel() if below else 0
    rows = ([first] if index > 0 and below else []) + ([final] if index < last else [])
    flat = torch.cat([row.movedim(1, 3).reshape(-1) for row in rows]) if rows else x.new_empty(0)
    coming = exchange(flat, sent, received, axis)
    if not any(received):
        zeros = coming.wait_before(zeros)
        return zeros, zeros
    batch, channels, _, width = first.shape
    sizes = [count for count in received if count]
    halo = [row.view(batch, 1, width, channels).movedim(3, 1) for row in torch.split(coming.wait(), sizes)]
    if zeros.is_contiguous():
        halo = [row.contiguous() for row in halo]
    return (halo[0] if index > 0 else zeros), (halo[-1] if index < last and below else zeros)


class RowNorm(nn.Module):
    """A group norm over the rows of all ranks, which merges their moments (Chan et al. 1979, equation 2.1)."""

    def __init__(self, norm: nn.GroupNorm, axis: Axis) -> None:
        super().__init__()
        self.norm, self.axis = norm, axis

    def forward(self, x: Tensor) -> Tensor:
        groups = torch.unflatten(x, 1, (self.norm.num_groups, -1))  # [B, G, C / G, ...], a view in any memory format
        wide = groups.to(torch.promote_types(x.dtype, torch.float32))
        inside = tuple(range(2, wide.ndim))
        expand = (..., *[None] * len(inside))
        mean = wide.mean(dim=inside)
        squares = (wide - mean[expand]).square().sum(dim=inside)
        count = torch.full_like(mean, wide[0, 0].numel())
        means, squares, counts = gather(torch.stack([mean, squares, count]), self.axis).wait().unbind(1)  # [R, B, G]
        total = counts.sum(dim=0)
        mean = (means * counts).sum(dim=0) / total
        squares = squares.sum(dim=0) + (counts * (means - mean).square()).sum(dim=0)
        scale = torch.rsqrt(squares / total + self.norm.eps)
        normed = ((wide - mean[expand]) * scale[expand]).flatten(1, 2)
        shape = (1, -1, *[1] * (x.ndim - 2))
        weight, bias = self.norm.weight.view(shape), self.norm.bias.view(shape)
        out: Tensor = (normed * weight + bias).to(x.dtype)
        return out


class RowAttention(nn.Module):
    """Attention to the rows of all ranks; keys and values are gathered while the queries are computed."""

    def __init__(self, attention: SelfAttention, axis: Axis, lengths: AnyLengths) -> None:
        super().__init__()
        self.attention, self.axis, self.lengths = attention, axis, lengths

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.attention
        query, rest = inner.to_qkv.weight.split([inner.to_qkv.out_features // 3, inner.to_qkv.out_features // 3 * 2])
        tokens = self.lengths.of_groups()
        coming = start_gather_along(F.linear(x, rest), 1, tokens, self.axis)
        q = rearrange(F.linear(x, query), "b l (h d) -> b h l d", h=inner.heads)
        k, v = rearrange(finish_gather_along(coming.wait(), 1, tokens), "b l (n h d) -> n b h l d", n=2, h=inner.heads)
        out: Tensor = inner.to_out(rearrange(inner.attend(q, k, v), "b h l d -> b l (h d)"))
        return out


class RowDecoder(nn.Module):
    """An autoencoder's decoder in which each rank decodes some rows and all ranks return the full image.

    Latents with fewer rows than ranks are decoded in full by every rank, with the same weights.
    """

    def __init__(self, decoder: nn.Module, axis: Axis) -> None:
        super().__init__()
        self.whole, self.axis, self.lengths = decoder, axis, CurrentLengths(axis.size, 1)
        self.decoder = copy.deepcopy(decoder, {id(weight): weight for weight in decoder.parameters()})
        split_rows(self.decoder, axis)
        for module in self.decoder.modules():
            if isinstance(module, Attend):
                module.kernel = Gathering(module.kernel, axis, self.lengths)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> images `[B, 3, H, W]`. Collective."""
        height, width = latents.shape[2:]
        if height < self.axis.size:
            images: Tensor = self.whole(latents)
            return images
        rows = shard_sizes(height, 1, self.axis.size)
        with self.lengths.of(tuple(count * width for count in rows)):
            out: Tensor = self.decoder(shard(latents, 2, rows, self.axis.index))
        factor = out.shape[3] // width
        return gather_along(out, 2, [count * factor for count in rows], self.axis)


def split_rows(network: nn.Module, axis: Axis) -> None:
    """Replace every 3 x 3 convolution and every group norm by its version for rows sharded over `axis`.

    This includes group norms over flattened tokens, whose moments are the same.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            assert module.kernel_size == (3, 3), module
            network.set_submodule(name, RowConv(module, axis))
        elif isinstance(module, nn.GroupNorm):
            network.set_submodule(name, RowNorm(module, axis))
