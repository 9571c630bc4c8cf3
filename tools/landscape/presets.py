"""Presets of network sizes and training schedules: one for two CPU cores, one for a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Autoencoder:
    widths: tuple[int, ...]  # channels per level; every level but the last halves the image
    latent_channels: int
    batch: int
    steps: int
    rate: float
    divergence: float = 1e-4  # weight of the KL term


@dataclass(frozen=True)
class Denoiser:
    layers: int
    heads: int
    head_dim: int
    patch: int
    text_width: int  # of each text encoder
    text_layers: int
    batch: int
    steps: int
    rate: float  # learning rate of AdamW
    muon_rate: float
    shift: float  # of the noise levels, in training and in the scheduler


@dataclass(frozen=True)
class Preset:
    size: int  # pixels
    images: int  # drawn for training
    autoencoder: Autoencoder
    denoiser: Denoiser


PRESETS = {
    "cpu": Preset(
        size=128,
        images=12000,
        autoencoder=Autoencoder((16, 32, 64), latent_channels=6, batch=4, steps=4500, rate=2e-3),
        denoiser=Denoiser(
            layers=7, heads=6, head_dim=32, patch=4, text_width=96, text_layers=2,
            batch=48, steps=2800, rate=1e-3, muon_rate=2e-3, shift=3.0,
        ),
    ),
    "gpu": Preset(
        size=256,
        images=100000,
        autoencoder=Autoencoder((64, 128, 256, 256), latent_channels=16, batch=32, steps=40000, rate=5e-4),
        denoiser=Denoiser(
            layers=12, heads=12, head_dim=64, patch=2, text_width=256, text_layers=4,
            batch=256, steps=100000, rate=5e-4, muon_rate=1e-3, shift=3.0,
        ),
    ),
}  # fmt: skip
