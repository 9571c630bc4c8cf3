"""Tiny autoencoders: configurations, diffusers' network of one, and what is encoded and decoded."""

import tiny
import torch
from diffusers import AutoencoderKL


def widths(*channels: int) -> dict:
    """Settings of an autoencoder with a level for each width."""
    return {"block_out_channels": channels, "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels), "norm_num_groups": 4}  # fmt: skip


PLAIN = widths(8, 12, 16) | {"layers_per_block": 2}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
VARIANTS = {
    "with convolutions around the latents": PLAIN,
    "with a shift and without these convolutions": PLAIN | NO_QUANT | {"latent_channels": 6, "shift_factor": 0.1},
    "without attention": widths(8, 16) | {"mid_block_add_attention": False},
    "a convolution behind the encoder alone": widths(8, 8, 16) | {"use_post_quant_conv": False},
    "a convolution before the decoder alone": widths(16, 8) | {"use_quant_conv": False, "layers_per_block": 3},
    "one level": widths(8) | {"layers_per_block": 1},
    "four levels, other pictures": widths(4, 8, 8, 12) | {"in_channels": 1, "out_channels": 2, "latent_channels": 1},
}


def reference(**config) -> AutoencoderKL:
    return tiny.fill(AutoencoderKL(**config), 5)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def pictures(config: dict, dtype: torch.dtype, batch: int, height: int, width: int) -> torch.Tensor:
    return draw(batch, config.get("in_channels", 3), height, width, dtype=dtype).clamp(-1, 1)


def latents(config: dict, dtype: torch.dtype, batch: int, height: int, width: int) -> torch.Tensor:
    return draw(batch, config.get("latent_channels", 4), height, width, dtype=dtype)
