"""Sequence parallelism: each rank has some of the tokens, and attention meets the others' in its leaf.

Ulysses (Jacobs et al. 2023) trades tokens for heads around the kernel. Ring (Liu et al. 2023) passes keys and values
from rank to rank and merges what each gives by its log-sum-exp. Both together are Ulysses around Ring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sglang_gen.models.attention import Kernel
from sglang_gen.parallel.collectives import Axis, Pending, exchange, gather_along

Summing = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # attention and log-sum-exp [B, H, L] of its scores


@dataclass
class Lengths:
    """Tokens of each sequence parallel rank in an attention, where ring is the outer axis; set before a generation."""

    ring: int
    ulysses: int
    tokens: tuple[int, ...] = field(default=())

    def of_group(self, ring: int) -> tuple[int, ...]:
        """Of the ranks of one Ulysses group."""
        return self.tokens[ring * self.ulysses : (ring + 1) * self.ulysses]

    def of_groups(self) -> tuple[int, ...]:
        """Of each Ulysses group together."""
        return tuple(sum(self.of_group(ring)) for ring in range(self.ring))


class Ulysses:
    """A kernel that sees all tokens of its group and this rank's share of the heads."""

    def __init__(self, kernel: Kernel, axis: Axis, ring: int, lengths: Lengths) -> None:
        """`ring` is this rank's place on the ring axis, which says what group it is in."""
        self.kernel, self.axis, self.ring, self.lengths = kernel, axis, ring, lengths

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, H, l, D]` of this rank's tokens -> the same shape."""
        tokens = self.lengths.of_group(self.ring)
        q, k, v = self._heads(torch.stack([q, k, v]), tokens).unbind()
        return self._tokens(self.kernel(q, k, v), tokens)

    def _heads(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """`[n, B, H, l, D]` of this rank's tokens -> `[n, B, H / ranks, L, D]` of this rank's heads."""
        n, batch, heads, length, width = x.shape
        ranks = self.axis.size
        mine = n * batch * (heads // ranks) * width
        blocks = x.view(n, batch, ranks, heads // ranks, length, width).movedim(2, 0)
        received = [mine * count for count in tokens]
        flat = exchange(blocks.reshape(-1), [mine * length] * ranks, received, self.axis).wait()
        parts = [
            part.view(n, batch, heads // ranks, count, width)
            for part, count in zip(torch.split(flat, received), tokens, strict=True)
        ]
        return torch.cat(parts, dim=3)

    def _tokens(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """`[B, H / ranks, L, D]` of this rank's heads -> `[B, H, l, D]` of its tokens."""
        batch, heads, _, width = x.shape
        ranks, length = self.axis.size, tokens[self.axis.index]
        one = batch * heads * width
        sent = [one * count for count in tokens]
        flat = torch.cat([part.reshape(-1) for part in torch.split(x, list(tokens), dim=2)])
        back = exchange(flat, sent, [one * length] * ranks, self.axis).wait()
        parts = back.view(ranks, batch, heads, length, width)
        return parts.transpose(0, 1).reshape(batch, ranks * heads, length, width)


class Ring:
    """Attention to the keys and values of all ranks, which come by one after the other while this one computes."""

    def __init__(self, kernel: Summing, axis: Axis, lengths: Lengths) -> None:
        self.kernel, self.axis, self.lengths = kernel, axis, lengths

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, H, l, D]` of this rank's tokens -> the same shape."""
        ranks, index = self.axis.size, self.axis.index
        tokens = self.lengths.of_groups()
        batch, heads, _, width = k.shape
        held = torch.stack([k, v])
        found = None
        for turn in range(ranks):
            coming = None
            if turn < ranks - 1:
                following = tokens[(index - turn - 1) % ranks]
                coming = self._pass_on(held, 2 * batch * heads * following * width)
            part = self.kernel(q, held[0], held[1])
            found = part if found is None else merged(found, part)
            if coming is not None:
                held = coming.wait().view(2, batch, heads, following, width)
        assert found is not None
        return found[0].to(q.dtype)

    def _pass_on(self, held: Tensor, coming: int) -> Pending:
        """Send what is held to the next rank, and receive so many numbers from the one before."""
        ranks, index = self.axis.size, self.axis.index
        sent, received = [0] * ranks, [0] * ranks
        sent[(index + 1) % ranks], received[(index - 1) % ranks] = held.numel(), coming
        return exchange(held.reshape(-1), sent, received, self.axis)


class Gathering:
    """Attention to the keys and values of all ranks at once, for kernels that give no log-sum-exp."""

    def __init__(self, kernel: Kernel, axis: Axis, lengths: Lengths) -> None:
        self.kernel, self.axis, self.lengths = kernel, axis, lengths

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, H, l, D]` of this rank's tokens -> the same shape."""
        keys, values = gather_along(torch.stack([k, v]), 3, self.lengths.of_groups(), self.axis)
        return self.kernel(q, keys, values)


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, in float32 or better, from what each gives: `[B, H, L, D]` and `[B, H, L]`."""
    lse = torch.logaddexp(one[1], other[1])
    weighted = [out.to(lse.dtype) * (part - lse).exp()[..., None] for out, part in (one, other)]
    return weighted[0] + weighted[1], lse
