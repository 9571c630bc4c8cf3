"""The variational autoencoder of latent diffusion (Rombach et al. 2022, section 3.1).

The encoder returns mean and log variance of a normal distribution (Kingma and Welling 2014), the decoder an image. Both
consist of group norms and convolutions, with self-attention only in the middle, at the coarsest resolution.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sglang_gen.models.attention import QKV, Attend
from sglang_gen.models.layers import Conv2d, GroupNorm, Linear

EPS = 1e-6  # of the group norms


@dataclass(frozen=True)
class Scaling:
    """Conversion between the autoencoder's latents and those of the denoising network (section D.1)."""

    factor: float
    shift: float
    mean: tuple[float, ...] | None  # per channel
    deviation: tuple[float, ...] | None  # standard deviation per channel


@dataclass(frozen=True)
class Config:
    channels_in: int  # of the encoder's input image
    channels_out: int  # of the decoded image
    channels: int  # of the latents
    widths: tuple[int, ...]  # from fine to coarse
    blocks: int  # residual blocks per level of the encoder; the decoder has one more
    groups: int  # of the group norms
    attention: bool  # self-attention in the middle
    quant_conv: bool  # 1 x 1 convolution after the encoder
    post_quant_conv: bool  # 1 x 1 convolution before the decoder
    scaling: Scaling
    upcast: bool  # activations overflow in float16

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.widths) - 1))


@dataclass(frozen=True)
class Posterior:
    """Normal distribution of an image's latents, with mean and standard deviation `[B, C, h, w]`."""

    mean: Tensor
    deviation: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Sample latents `[B, C, h, w]` with a CPU generator."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device="cpu")
        return self.mean + self.deviation * noise.to(self.mean.device)


def posterior(moments: Tensor) -> Posterior:
    """The distribution from mean and log variance `[B, 2 C, h, w]`; the log variance is clamped to -30..20."""
    mean, log_variance = moments.chunk(2, dim=1)
    return Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)))


class Residual(nn.Module):
    """Residual block: two times group norm, SiLU and convolution."""

    def __init__(self, groups: int, width_in: int, width: int) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(groups, width_in, EPS)
        self.conv_1 = Conv2d(width_in, width, 3, padding=1)
        self.norm_2 = GroupNorm(groups, width, EPS)
        self.conv_2 = Conv2d(width, width, 3, padding=1)
        self.shortcut = Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv_1(F.silu(self.norm_1(x)))
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(inner)))


class Attention(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, EPS)
        self.to_qkv = Linear(width, dict.fromkeys(QKV, width))
        self.attend = Attend()
        self.to_out = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]`."""
        tokens = self.norm(x.flatten(2)).mT  # [B, L, C]
        q, k, v = rearrange(self.to_qkv(tokens), "b l (n d) -> n b 1 l d", n=3)
        attended = self.to_out(rearrange(self.attend(q, k, v), "b 1 l d -> b l d"))
        # Keep this memory format (channels last for a batch): the following layers round differently in another one.
        return attended.mT.reshape(x.shape) + x


class Middle(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.widths[-1]
        self.residuals = nn.ModuleList(Residual(config.groups, width, width) for _ in range(2))
        self.attention = Attention(config.groups, width) if config.attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.residuals
        return second(self.attention(first(x)))


class Downsample(nn.Module):
    """Halve rows and columns, rounded down; pads only below and to the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks and a down- or upsampling layer."""

    def __init__(self, groups: int, width_in: int, width: int, blocks: int) -> None:
        super().__init__()
        widths_in = [width_in] + [width] * (blocks - 1)
        self.residuals = nn.ModuleList(Residual(groups, width_in, width) for width_in in widths_in)
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for residual in self.residuals:
            x = residual(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Encoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        finest, coarsest = config.widths[0], config.widths[-1]
        self.conv_in = Conv2d(config.channels_in, finest, 3, padding=1)
        self.down = _levels(config, config.widths, config.blocks)
        for level, width in zip(self.down[:-1], config.widths, strict=False):
            level.downsample = Downsample(width)
        self.middle = Middle(config)
        self.norm_out = GroupNorm(config.groups, coarsest, EPS)
        self.conv_out = Conv2d(coarsest, 2 * config.channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` -> means and log variances `[B, 2 C, h, w]`."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = Conv2d(config.channels, widths[0], 3, padding=1)
        self.middle = Middle(config)
        self.up = _levels(config, widths, config.blocks + 1)
        for level, width in zip(self.up[:-1], widths, strict=False):
            level.upsample = Upsample(width)
        self.norm_out = GroupNorm(config.groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], config.channels_out, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> images `[B, 3, H, W]`."""
        x = self.middle(self.conv_in(latents))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _levels(config: Config, widths: tuple[int, ...], blocks: int) -> nn.ModuleList:
    """One level for each width, in order; the first level has equal input and output width."""
    widths_in = (widths[0], *widths[:-1])
    return nn.ModuleList(
        Level(config.groups, width_in, width, blocks) for width_in, width in zip(widths_in, widths, strict=True)
    )


class Autoencoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        both = 2 * config.channels
        self.quant_conv = Conv2d(both, both, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(config.channels, config.channels, 1) if config.post_quant_conv else nn.Identity()

    def encode(self, images: Tensor) -> Posterior:
        """The distribution of the latents `[B, C, h, w]` of images `[B, 3, H, W]` in -1..1."""
        return posterior(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in -1..1 from latents `[B, C, h, w]`."""
        return self.decoder(self.post_quant_conv(latents))
