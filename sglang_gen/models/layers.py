"""Layers shared by several networks."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


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
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear, with a hidden width of 4 x `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Modulation(nn.Module):
    """SiLU and a linear layer: `[..., D]` -> `count` modulation vectors `[..., count, D]`."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> Tensor:
        return rearrange(self.linear(F.silu(vector)), "... (n d) -> ... n d", n=self.count)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift `[B, 1, D]` (Peebles and Xie 2023, adaLN)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
