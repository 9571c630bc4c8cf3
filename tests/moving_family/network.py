"""A transformer over the latents of all frames and the text, modulated by the timestep."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sglang_gen.models import chain
from sglang_gen.models.attention import SelfAttention
from sglang_gen.models.chain import Chain
from sglang_gen.models.layers import Embedder, FeedForward, Linear, sinusoid


@dataclass(frozen=True)
class Config:
    channels: int
    layers: int
    heads: int
    head_dim: int
    text_width: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Conditioning:
    """S steps, batch B, T text tokens, L tokens of all frames, width D."""

    text: Tensor  # [B, T, D]
    positions: Tensor  # [L, D]
    blocks: list[tuple[Tensor, ...]]  # shift of each block [S, D]

    @cached_property
    def steps(self) -> "list[Conditioning]":
        return [replace(self, blocks=chain.at(step, self.blocks)) for step in range(len(self.blocks[0][0]))]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.ff = FeedForward(config.width)

    def forward(self, video: Tensor, text: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Video `[B, L, D]` and text `[B, T, D]`; both attend to both."""
        x = torch.cat([text, video], dim=1)
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]) + shift)
        x = x + self.ff(F.layer_norm(x, x.shape[-1:]))
        text, video = x.split([text.shape[1], video.shape[1]], dim=1)
        return _copied(video), _copied(text)


def _copied(x: Tensor) -> Tensor:
    """A contiguous copy: compiled code guards on the strides of a single row too."""
    return x.clone(memory_format=torch.contiguous_format)


class Moving(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = Linear(config.channels, config.width)
        self.text = Linear(config.text_width, config.width)
        self.time = Embedder(config.width, config.width)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.chain = Chain()
        self.out = Linear(config.width, config.channels)

    def condition(self, timesteps: Tensor, text: Tensor, frames: int, height: int, width: int) -> Conditioning:
        """The conditioning of all timesteps `[S]` for encoded text `[B, T, C]` and latents of this size."""
        places = torch.arange(frames * height * width, device=text.device)
        times = self.time(sinusoid(timesteps.to(text.device), self.config.width).to(text.dtype))
        return Conditioning(
            self.text(text),
            sinusoid(places, self.config.width).to(text.dtype),
            [(times * (number + 1),) for number in range(self.config.layers)],
        )

    def forward(self, latents: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """The velocity of latents `[B, C, F, h, w]`."""
        return self.evaluate(latents, conditioning.steps[step])

    def evaluate(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        _, _, frames, height, width = latents.shape
        video = self.tokens(rearrange(latents, "b c f h w -> b (f h w) c")) + conditioning.positions
        video, _ = self.chain(self.blocks, (video, conditioning.text), conditioning.blocks)
        return rearrange(self.out(video), "b (f h w) c -> b c f h w", f=frames, h=height, w=width)
