"""The UNet of latent diffusion: Stable Diffusion 1 and 2 (Rombach et al. 2022), SDXL (Podell et al. 2023, section 2.1).

Residual blocks take the time as one vector added to their channels, transformers read the text. Neither depends on the
latents, so `condition` computes the vectors of all steps and the keys and values of the text before the first step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sglang_gen.models.attention import Attend
from sglang_gen.models.layers import Embedder, sinusoid


@dataclass(frozen=True)
class LevelConfig:
    """One resolution."""

    width: int
    heads: int
    blocks: int  # residual blocks
    depth: int  # layers of the transformer behind each of them; 0: there is none


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


@dataclass(frozen=True)
class Conditioning:
    """All that does not change between steps, in the order in which `forward` comes by.

    S steps, B rows, C channels of the block, H heads, T text tokens, D channels of a head.
    """

    times: list[Tensor]  # for each residual block [S, B or 1, C]
    texts: list[list[Tensor]]  # for each transformer, for each layer: keys and values [2, B, H, T, D]

    def at(self, step: int) -> "Conditioning":
        """Of one step: without the dimension S."""
        return Conditioning([time[step] for time in self.times], self.texts)


class Residual(nn.Module):
    """Two convolutions behind group norms, with the time added between them."""

    def __init__(self, config: Config, width_in: int, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(config.groups, width_in, config.eps)
        self.conv_1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.time = nn.Linear(4 * config.width, width)
        self.norm_2 = nn.GroupNorm(config.groups, width, config.eps)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`[B, C, h, w]` and the time's vector `[B or 1, C]`."""
        inner = self.conv_1(F.silu(self.norm_1(x))) + time[:, :, None, None]
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(inner)))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attend = Attend()
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)
        return self.to_out(rearrange(self.attend(q, k, v), "b h l d -> b l (h d)"))


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are the same in all steps."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.attend = Attend()
        self.to_out = nn.Linear(width, width)

    def read(self, text: Tensor) -> Tensor:
        """Keys and values `[2, B, H, T, D]` of the text `[B, T, C]`."""
        return rearrange(self.to_kv(text), "b t (n h d) -> n b h t d", n=2, h=self.heads).contiguous()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = rearrange(self.to_q(x), "b l (h d) -> b h l d", h=self.heads)
        return self.to_out(rearrange(self.attend(q, text[0], text[1]), "b h l d -> b l (h d)"))


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): four times as wide inside, gated by GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class Block(nn.Module):
    """Attention of the picture to itself, attention to the text, feed-forward."""

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
    """Layers over all positions of a picture as tokens, row by row."""

    def __init__(self, config: Config, level: LevelConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, level.width, eps=1e-6)
        self.project_in = nn.Linear(level.width, level.width)
        self.blocks = nn.ModuleList(Block(level.width, level.heads, config.text_width) for _ in range(level.depth))
        self.project_out = nn.Linear(level.width, level.width)

    def forward(self, x: Tensor, texts: list[Tensor]) -> Tensor:
        """`[B, C, h, w]`; for each layer keys and values of the text."""
        tokens = self.project_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block, text in zip(self.blocks, texts, strict=True):
            tokens = block(tokens, text)
        return x + rearrange(self.project_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """To the size of the level above, which is one less than twice where that one's is odd."""
        return self.conv(F.interpolate(x, (height, width), mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, a transformer behind each where it attends, and the way to the next."""

    def __init__(self, config: Config, level: LevelConfig, widths_in: list[int], transformers: int) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(Residual(config, width_in, level.width) for width_in in widths_in)
        self.transformers = nn.ModuleList(Transformer(config, level) for _ in range(transformers))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def stages(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        return zip_longest(self.residuals, self.transformers)


class UNet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv2d(config.channels_in, config.width, 3, padding=1)
        self.time_embedder = Embedder(config.width, 4 * config.width)
        self.added_embedder = Embedder(config.added_width, 4 * config.width) if config.added_width else None
        self.down, skips = _down(config)
        middle = config.middle
        self.middle = Level(config, middle, [middle.width] * 2, transformers=1)
        self.up = _up(config, skips)
        self.norm_out = nn.GroupNorm(config.groups, config.width, config.eps)
        self.conv_out = nn.Conv2d(config.width, config.channels_out, 3, padding=1)

    def levels(self) -> list[Level]:
        """In the order of `forward`."""
        return [*self.down, self.middle, *self.up]

    def condition(
        self, timesteps: Tensor, text: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Conditioning:
        """Timesteps `[S]` in 0..1000, text `[B, T, C]`; of SDXL also pooled text `[B, P]` and sizes `[B, 6]`."""
        vector = self.time_embedder(sinusoid(timesteps.to(text.device), self.config.width).to(text.dtype))[:, None]
        if self.added_embedder is not None:
            assert pooled is not None
            assert sizes is not None
            each = sinusoid(sizes, self.config.size_width).to(text.dtype)  # [B, 6, size_width]
            vector = vector + self.added_embedder(torch.cat([pooled, each.flatten(1)], dim=1))  # [S, B, 4 width]
        vector = F.silu(vector)
        times = [block.time(vector) for level in self.levels() for block in level.residuals]
        texts = [
            [block.cross_attention.read(text) for block in transformer.blocks]
            for level in self.levels()
            for transformer in level.transformers
        ]
        return Conditioning(times, texts)

    def forward(self, latents: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """What the scheduler asks for (noise or velocity) `[B, C, h, w]` at the step's timestep."""
        return self.evaluate(latents, conditioning.at(step))

    def evaluate(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """`forward` for the conditioning of one step."""
        times, texts = iter(conditioning.times), iter(conditioning.texts)

        def stage(x: Tensor, residual: nn.Module, transformer: nn.Module | None) -> Tensor:
            x = residual(x, next(times))
            return x if transformer is None else transformer(x, next(texts))

        x = self.conv_in(latents)
        skips = [x]
        for level in self.down:
            for pair in level.stages():
                x = stage(x, *pair)
                skips.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
                skips.append(x)
        for pair in self.middle.stages():
            x = stage(x, *pair)
        for level in self.up:
            for pair in level.stages():
                x = stage(torch.cat([x, skips.pop()], dim=1), *pair)
            if level.upsample is not None:
                x = level.upsample(x, *skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.norm_out(x)))


def _down(config: Config) -> tuple[nn.ModuleList, list[int]]:
    """The levels on the way down, and the widths of what they leave for the way up, `conv_in` included."""
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
    """The levels on the way up; each residual block also takes what stands last in `skips`."""
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
