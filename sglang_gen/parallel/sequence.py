"""Sequence parallel attention: each rank holds a shard of the tokens and attends to the tokens of all ranks.

Ulysses (Jacobs et al. 2023) exchanges tokens for heads around the kernel. Ring (Liu et al. 2023) passes keys and values
from rank to rank and merges the partial results by their log-sum-exp. If both are used, Ulysses wraps Ring.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_gen.models.attention import Kernel
from sglang_gen.parallel.collectives import (
    Axis,
    Pending,
    exchange,
    finish_gather_along,
    gather_along,
    start_gather_along,
)

# (q, k, v) or (q, k, v, mask) -> attention [B, H, L, D] and the log-sum-exp [B, H, L] of its scores.
# A mask [B, 1, 1, S] has at least one key of each sample.
KernelWithLSE = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence parallel rank in one kind of attention; ring is the outer axis."""

    ring: int
    ulysses: int
    tokens: tuple[int, ...]

    def of_group(self, ring: int) -> tuple[int, ...]:
        """Tokens of each rank of one Ulysses group."""
        return self.tokens[ring * self.ulysses : (ring + 1) * self.ulysses]

    def of_groups(self) -> tuple[int, ...]:
        """Total tokens of each Ulysses group."""
        return tuple(sum(self.of_group(ring)) for ring in range(self.ring))


class CurrentLengths:
    """The lengths of the evaluation that is running, as the attention ops of one kind read them.

    There are none between evaluations, so that an op never reads those of another batch. They are an attribute, on
    whose value compiled code has guards; torch.compile cannot trace a read of a context variable.
    """

    def __init__(self, ring: int, ulysses: int) -> None:
        self.ring, self.ulysses = ring, ulysses
        self.running: Lengths | None = None

    @contextmanager
    def of(self, tokens: tuple[int, ...]) -> Iterator[None]:
        """Within this context the ranks have these numbers of tokens."""
        before, self.running = self.running, Lengths(self.ring, self.ulysses, tokens)
        try:
            yield
        finally:
            self.running = before

    def of_group(self, ring: int) -> tuple[int, ...]:
        return self._known().of_group(ring)

    def of_groups(self) -> tuple[int, ...]:
        return self._known().of_groups()

    def _known(self) -> Lengths:
        assert self.running is not None, "attention over sharded tokens outside of an evaluation"
        return self.running


AnyLengths = Lengths | CurrentLengths


class Ulysses:
    """Runs the kernel on all tokens of the Ulysses group and this rank's share of the heads."""

    def __init__(self, kernel: Kernel, axis: Axis, ring: int, lengths: AnyLengths) -> None:
        """`ring` is this rank's coordinate on the ring axis, which selects its Ulysses group."""
        self.kernel, self.axis, self.ring, self.lengths = kernel, axis, ring, lengths

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, H, l, D]` of this rank's tokens and their mask `[B, 1, 1, l]` -> `[B, H, l, D]`."""
        tokens = self.lengths.of_group(self.ring)
        coming = None if mask is None else start_gather_along(mask, 3, tokens, self.axis)
        q, k, v = self._heads(torch.stack([q, k, v]), tokens).unbind()
        masks = () if coming is None else (finish_gather_along(coming.wait(), 3, tokens),)
        return self._tokens(self.kernel(q, k, v, *masks), tokens)

    def _heads(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """`[n, B, H, l, D]` of this rank's tokens -> `[n, B, H / ranks, L, D]` of this rank's heads."""
        n, batch, heads, length, width = x.shape
        ranks = self.axis.size
        mine = n * batch * (heads // ranks) * width
        blocks = x.view(n, batch, ranks, heads // ranks, length, width).movedim(2, 0)
        received = [mine * count for count in tokens]
        flat = exchange(blocks.reshape(-1), [mine * length] * ranks, received, self.axis).wait()
        shards = [
            shard.view(n, batch, heads // ranks, count, width)
            for shard, count in zip(torch.split(flat, received), tokens, strict=True)
        ]
        return torch.cat(shards, dim=3)

    def _tokens(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """`[B, H / ranks, L, D]` of this rank's heads -> `[B, H, l, D]` of its tokens."""
        batch, heads, _, width = x.shape
        ranks, length = self.axis.size, tokens[self.axis.index]
        one = batch * heads * width
        sent = [one * count for count in tokens]
        flat = torch.cat([shard.reshape(-1) for shard in torch.split(x, list(tokens), dim=2)])
        back = exchange(flat, sent, [one * length] * ranks, self.axis).wait()
        by_rank = back.view(ranks, batch, heads, length, width)
        return by_rank.transpose(0, 1).reshape(batch, ranks * heads, length, width)


class Ring:
    """Attention to the keys and values of all ranks, which arrive one rank at a time while this rank computes.

    A mask travels with its keys, as further elements of the same exchange.
    """

    def __init__(self, kernel: KernelWithLSE, axis: Axis, lengths: AnyLengths) -> None:
        self.kernel, self.axis, self.lengths = kernel, axis, lengths

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, H, l, D]` of this rank's tokens and their mask `[B, 1, 1, l]` -> `[B, H, l, D]`."""
        ranks, index = self.axis.size, self.axis.index
        tokens = self.lengths.of_groups()
        batch, heads, length, width = k.shape
        per_token = batch * (2 * heads * width + (mask is not None))  # elements
        current = _packed(k, v, mask)
        total = None
        for turn in range(ranks):
            coming = None
            if turn < ranks - 1:
                following = tokens[(index - turn - 1) % ranks]
                coming = self._pass_on(current, per_token * following)
            partial = self._partial(q, *_unpacked(current, batch, heads, length, width))
            total = partial if total is None else merged(total, partial, masked=mask is not None)
            if coming is not None:
                current, length = coming.wait(), following
        assert total is not None
        return total[0].to(q.dtype)

    def _pass_on(self, current: Tensor, coming: int) -> Pending:
        """Send the current keys and values to the next rank, and receive `coming` elements from the previous one."""
        ranks, index = self.axis.size, self.axis.index
        sent, received = [0] * ranks, [0] * ranks
        sent[(index + 1) % ranks], received[(index - 1) % ranks] = current.numel(), coming
        return exchange(current, sent, received, self.axis)

    def _partial(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention to one rank's keys and its log-sum-exp, which is -inf for a sample whose keys are all masked.

        Kernels disagree about a softmax over nothing, so such a sample is computed without its mask.
        """
        if mask is None:
            return self.kernel(q, k, v)
        nothing = ~mask.any(dim=-1, keepdim=True)  # [B, 1, 1, 1]
        out, lse = self.kernel(q, k, v, mask | nothing)
        return out, lse.masked_fill(nothing[..., 0], -math.inf)


def _packed(k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Keys, values and their mask as one flat tensor of the keys' dtype."""
    if mask is None:
        return torch.stack([k, v]).reshape(-1)
    return torch.cat([k.reshape(-1), v.reshape(-1), mask.reshape(-1).to(k.dtype)])


def _unpacked(flat: Tensor, batch: int, heads: int, length: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `[B, H, l, D]` and, if there is one, the mask `[B, 1, 1, l]`."""
    size = batch * heads * length * width
    k, v = flat[: 2 * size].view(2, batch, heads, length, width).unbind()
    masked = flat.numel() > 2 * size
    return k, v, flat[2 * size :].view(batch, 1, 1, length) != 0 if masked else None


class Gathering:
    """Attention to the gathered keys and values of all ranks, for kernels that do not return the log-sum-exp."""

    def __init__(self, kernel: Kernel, axis: Axis, lengths: AnyLengths) -> None:
        self.kernel, self.axis, self.lengths = kernel, axis, lengths

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, H, l, D]` of this rank's tokens and their mask `[B, 1, 1, l]` -> `[B, H, l, D]`."""
        tokens = self.lengths.of_groups()
        keys, values = gather_along(torch.stack([k, v]), 3, tokens, self.axis)
        masks = () if mask is None else (gather_along(mask, 3, tokens, self.axis),)
        return self.kernel(q, keys, values, *masks)


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], masked: bool = False) -> tuple[Tensor, Tensor]:
    """Merge attention `[B, H, L, D]` and log-sum-exp `[B, H, L]` over two sets of keys, in float32 or wider.

    With `masked` both sets may be empty for a sample: its log-sum-exp is -inf, and its attention is 0.
    """
    lse = torch.logaddexp(one[1], other[1])
    base = lse.clamp_min(torch.finfo(lse.dtype).min) if masked else lse  # -inf - -inf is NaN
    weighted = [out.to(lse.dtype) * (own - base).exp()[..., None] for out, own in (one, other)]
    return weighted[0] + weighted[1], lse
