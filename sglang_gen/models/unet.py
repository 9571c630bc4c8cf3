"""The UNet of latent diffusion: Stable Diffusion 1 and 2 (Rombach et al. 2022), SDXL (Podell et al. 2023, section 2.1).

Residual blocks add a projected timestep embedding to their channels, transformers have cross-attention to the text.
Neither depends on the latents, so `condition` computes all steps' projections and the text's keys and values once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sglang_gen.models.attention import Attend, SelfAttention
from sglang_gen.models.chain import Chain
from sglang_gen.models.layers import Conv2d, Embedder, GroupNorm, Linear, sinusoid


@dataclass(frozen=True)
class LevelConfig:
    """One resolution."""

    width: int
    heads: int
    blocks: int  # residual blocks
    depth: int  # layers of the transformer after each residual block; 0: no transformer


@dataclass(frozen=True)
class Config:
    channels_in: int
    channels_out: int
    down: tuple[LevelConfig, ...]  # from fine to coarse
    middle: LevelConfig
    up: tuple[LevelConfig, ...]  # from coarse to fine
    text_width: int
    groups: int  # of the group norms
    eps: float  # of the group norms in residual blocks and at the end
    size_width: int  # channels of each of the six sizes of SDXL
    added_width: int  # channels of pooled text and sizes together; 0: neither is an input

    @property
    def width(self) -> int:
        return self.down[0].width


Skips = tuple[Tensor, ...]  # feature maps of skip connections, the last pushed one at the end
State = tuple[Tensor, Skips]  # of the chain of stages: feature map [B, C, h, w] and skip connections
Texts = list[Tensor]  # for each layer of a transformer: keys and values of the text [2, B, H, T, D]


@dataclass(frozen=True)
class Conditioning:
    """Inputs that are computed once for all steps. S steps, batch B, C channels of the block."""

    # For each stage with a residual block: projected times [S, B or 1, C] and texts; for downsampling nothing.
    blocks: list[tuple[Tensor, Texts] | tuple[()]]
    count: int  # S

    @cached_property
    def steps(self) -> "list[Conditioning]":
        """The conditioning of each step, without the dimension S."""
        return [
            Conditioning([(block[0][step], block[1]) if block else () for block in self.blocks], 1)
            for step in range(self.count)
        ]


class Residual(nn.Module):
    """Residual block: two times group norm, SiLU and convolution, with the time embedding added in between."""

    def __init__(self, config: Config, width_in: int, width: int) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(config.groups, width_in, config.eps)
        self.conv_1 = Conv2d(width_in, width, 3, padding=1)
        self.time = Linear(4 * config.width, width)
        self.norm_2 = GroupNorm(config.groups, width, config.eps)
        self.conv_2 = Conv2d(width, width, 3, padding=1)
        self.shortcut = Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`[B, C, h, w]` and the projected time embedding `[B or 1, C]`."""
        inner = self.conv_1(F.silu(self.norm_1(x))) + time[:, :, None, None]
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(inner)))


class CrossAttention(nn.Module):
    """Cross-attention to the text, whose keys and values are the same in all steps."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_kv = Linear(text_width, {"k": width, "v": width}, bias=False)
        self.attend = Attend()
        self.to_out = Linear(width, width)

    def read(self, text: Tensor) -> Tensor:
        """Keys and values `[2, B, H, T, D]` of the text `[B, T, C]`."""
        return rearrange(self.to_kv(text), "b t (n h d) -> n b h t d", n=2, h=self.heads).contiguous()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = rearrange(self.to_q(x), "b l (h d) -> b h l d", h=self.heads)
        return self.to_out(rearrange(self.attend(q, text[0], text[1]), "b h l d -> b l (h d)"))


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): linear, gated by GELU, linear, with a hidden width of 4 x `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = Linear(width, {"value": 4 * width, "gate": 4 * width})
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, heads, text_width)
        self.ff = GatedFeedForward(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Tokens `[B, L, C]`, keys and values of the text `[2, B, H, T, D]`."""
        x = x + self.self_attention(self.norm_1(x))
        x = x + self.cross_attention(self.norm_2(x), text)
        return x + self.ff(self.norm_3(x))


class Transformer(nn.Module):
    """Transformer blocks over all positions of a feature map as tokens, row by row."""

    def __init__(self, config: Config, level: LevelConfig) -> None:
        super().__init__()
        self.norm = GroupNorm(config.groups, level.width, eps=1e-6)
        self.project_in = Linear(level.width, level.width)
        self.blocks = nn.ModuleList(Block(level.width, level.heads, config.text_width) for _ in range(level.depth))
        self.project_out = Linear(level.width, level.width)

    def forward(self, x: Tensor, texts: list[Tensor]) -> Tensor:
        """`[B, C, h, w]` and, for each block, keys and values of the text `[2, B, H, T, D]`."""
        tokens = self.project_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block, text in zip(self.blocks, texts, strict=True):
            tokens = block(tokens, text)
        return x + rearrange(self.project_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Upsample to the next finer level's size, which is odd if downsampling rounded it up."""
        return self.conv(F.interpolate(x, (height, width), mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, an optional transformer after each, and a down- or upsampling layer."""

    def __init__(self, config: Config, level: LevelConfig, widths_in: list[int], transformers: int) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(Residual(config, width_in, level.width) for width_in in widths_in)
        self.transformers = nn.ModuleList(Transformer(config, level) for _ in range(transformers))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Each residual block and the transformer after it."""
        return zip_longest(self.residuals, self.transformers)


@dataclass(frozen=True)
class Stage:
    """One link of the chain: modules that share a place in it, and the skip connections that it pushes and pops.

    Upsampling belongs to the stage that pops the last skip connection of the coarser level, which downsampling pushed,
    so stages that push as many skip connections as they pop can be left out together.
    """

    residual: Any = None
    transformer: Any = None
    downsample: Any = None
    upsample: Any = None
    pushes: int = 0
    pops: int = 0

    def __call__(self, x: Tensor, skips: Skips, time: Tensor | None = None, texts: Texts | None = None) -> State:
        if self.pops:
            x, skips = torch.cat([x, skips[-1]], dim=1), skips[:-1]
        if self.residual is not None:
            x = self.residual(x, time)
        if self.transformer is not None:
            x = self.transformer(x, texts)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x, *skips[-1].shape[-2:])
        return x, (*skips, x) if self.pushes else skips


class UNet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.conv_in = Conv2d(config.channels_in, config.width, 3, padding=1)
        self.time_embedder = Embedder(config.width, 4 * config.width)
        self.added_embedder = Embedder(config.added_width, 4 * config.width) if config.added_width else None
        self.down, skips = _down(config)
        middle = config.middle
        self.middle = Level(config, middle, [middle.width] * 2, transformers=1)
        self.up = _up(config, skips)
        self.norm_out = GroupNorm(config.groups, config.width, config.eps)
        self.conv_out = Conv2d(config.width, config.channels_out, 3, padding=1)
        self.chain = Chain()

    def levels(self) -> list[Level]:
        """All levels in the order of `forward`."""
        return [*self.down, self.middle, *self.up]

    def condition(
        self, timesteps: Tensor, text: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Conditioning:
        """Timesteps `[S]` in 0..1000, text `[B, T, C]`; for SDXL also pooled text `[B, P]` and sizes `[B, 6]`."""
        vector = self.time_embedder(sinusoid(timesteps.to(text.device), self.config.width).to(text.dtype))[:, None]
        if self.added_embedder is not None:
            assert pooled is not None
            assert sizes is not None
            embedded = sinusoid(sizes, self.config.size_width).to(text.dtype)  # [B, 6, size_width]
            vector = vector + self.added_embedder(torch.cat([pooled, embedded.flatten(1)], dim=1))  # [S, B, 4 width]
        vector = F.silu(vector)
        blocks: list[tuple[Tensor, Texts] | tuple[()]] = []
        for stage in self.stages():
            if stage.residual is None:
                blocks.append(())
                continue
            layers = () if stage.transformer is None else stage.transformer.blocks
            blocks.append((stage.residual.time(vector), [block.cross_attention.read(text) for block in layers]))
        return Conditioning(blocks, len(timesteps))

    def stages(self) -> list[Stage]:
        """The stages of the chain, in order."""
        stages: list[Stage] = []
        for level in self.down:
            stages += [Stage(residual, transformer, pushes=1) for residual, transformer in level.pairs()]
            if level.downsample is not None:
                stages.append(Stage(downsample=level.downsample, pushes=1))
        stages += [Stage(residual, transformer) for residual, transformer in self.middle.pairs()]
        for level in self.up:
            stages += [Stage(residual, transformer, pops=1) for residual, transformer in level.pairs()]
            stages[-1] = replace(stages[-1], upsample=level.upsample)
        return stages

    def forward(self, latents: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """The prediction (noise or velocity) `[B, C, h, w]` at the step's timestep."""
        return self.evaluate(latents, conditioning.steps[step])

    def evaluate(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """`forward` for the conditioning of one step."""
        x = self.conv_in(latents)
        x, _ = self.chain(self.stages(), (x, (x,)), conditioning.blocks)
        return self.conv_out(F.silu(self.norm_out(x)))


def _down(config: Config) -> tuple[nn.ModuleList, list[int]]:
    """The downsampling levels, and the widths of their skip connections, including that of `conv_in`."""
    levels, skips = nn.ModuleList(), [config.width]
    for level in config.down:
        built = Level(config, level, [skips[-1]] + [level.width] * (level.blocks - 1), _transformers(level))
        skips += [level.width] * level.blocks
        if len(levels) < len(config.down) - 1:
            built.downsample = Downsample(level.width)
            skips.append(level.width)
        levels.append(built)
    return levels, skips


def _up(config: Config, skips: list[int]) -> nn.ModuleList:
    """The upsampling levels; each residual block also takes the last remaining skip connection."""
    levels, below = nn.ModuleList(), config.middle.width
    for level in config.up:
        widths = [below] + [level.width] * (level.blocks - 1)
        built = Level(config, level, [width + skips.pop() for width in widths], _transformers(level))
        if len(levels) < len(config.up) - 1:
            built.upsample = Upsample(level.width)
        below = level.width
        levels.append(built)
    return levels


def _transformers(level: LevelConfig) -> int:
    return level.blocks if level.depth else 0
