"""Exact spatial parallelism of convolutional networks: each rank holds some rows of every feature map.

Consecutive rows are consecutive tokens, so attention is sharded as in sequence parallelism. A 3 x 3 convolution takes
one halo row from each neighbouring rank, a group norm merges the moments of all ranks.
"""

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sglang_gen.models.attention import Attend, SelfAttention
from sglang_gen.models.layers import Conv2d, GroupNorm
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


class Halo(nn.Module):
    """Adds the rows next to this rank's shard, which are on neighbouring ranks, for a convolution with padding 1.

    With stride 2 a shard begins at an even row, so the row below it is never read.
    """

    def __init__(self, axis: Axis, below: bool) -> None:
        super().__init__()
        self.axis, self.below = axis, below

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` -> `[B, C, h + 2, w]`."""
        above, below = neighbours(x, self.axis, self.below)
        return torch.cat([above, x, below], dim=2)


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


class RowMoments(nn.Module):
    """Moments of a group norm over the rows of all ranks (Chan et al. 1979, equation 2.1)."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean and variance `[B, G]` of this rank's rows, `count` numbers in each group -> those of all ranks' rows."""
        own = torch.stack([mean, variance * count, torch.full_like(mean, count)])
        means, squares, counts = gather(own, self.axis).wait().unbind(1)  # [R, B, G]
        total = counts.sum(dim=0)
        mean = (means * counts).sum(dim=0) / total
        squares = squares.sum(dim=0) + (counts * (means - mean).square()).sum(dim=0)
        return mean, squares / total


class RowAttention(nn.Module):
    """Attention to the rows of all ranks; keys and values are gathered while the queries are computed."""

    def __init__(self, attention: SelfAttention, axis: Axis, lengths: AnyLengths) -> None:
        super().__init__()
        self.attention, self.axis, self.lengths = attention, axis, lengths

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        inner: Any = self.attention
        tokens = self.lengths.of_groups()
        coming_mask = None if mask is None else start_gather_along(mask, 1, tokens, self.axis)
        coming = start_gather_along(inner.to_qkv(x, only=("k", "v")), 1, tokens, self.axis)
        q = rearrange(inner.to_qkv(x, only=("q",)), "b l (h d) -> b h l d", h=inner.heads)
        k, v = rearrange(finish_gather_along(coming.wait(), 1, tokens), "b l (n h d) -> n b h l d", n=2, h=inner.heads)
        whole = None if coming_mask is None else finish_gather_along(coming_mask.wait(), 1, tokens)
        out: Tensor = inner.to_out(rearrange(inner.attend(q, k, v, whole), "b h l d -> b l (h d)"))
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
    """Let every 3 x 3 convolution and every group norm compute rows that are sharded over `axis`.

    This includes group norms over flattened tokens, whose moments are the same.
    """
    for module in network.modules():
        if isinstance(module, Conv2d) and module.kernel_size != (1, 1):
            module.add_halo(Halo(axis, below=module.stride[0] == 1))
        elif isinstance(module, GroupNorm):
            module.moments = RowMoments(axis)
