"""The attention op: a module without parameters, on which kernels and sequence parallelism are set."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from sglang_gen.models.layers import Linear

# (q, k, v) or, if it takes a mask, (q, k, v, mask) -> attention; mask [B, 1, 1, S] as in scaled_dot_product_attention
Kernel = Callable[..., Tensor]


class Attend(nn.Module):
    """softmax(q k^T / sqrt(D)) v for q `[B, H, L, D]`, k and v `[B, H, S, D]`; the result is `[B, H, L, D]`.

    `mask` is a boolean `[B, S]`: which keys of each sample are attended to. None: all of them.
    """

    kernel: Kernel

    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.nn.functional.scaled_dot_product_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.kernel(q, k, v) if mask is None else self.kernel(q, k, v, mask[:, None, None])


QKV = ("q", "k", "v")


class SelfAttention(nn.Module):
    """Self-attention with a fused projection to query, key and value."""

    def __init__(self, width: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(width, dict.fromkeys(QKV, width), bias)
        self.attend = Attend()
        self.to_out = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, L, C]`, and the tokens `[B, L]` that are attended to -> the shape of `x`."""
        q, k, v = rearrange(self.to_qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)
        return self.to_out(rearrange(self.attend(q, k, v, mask), "b h l d -> b l (h d)"))
