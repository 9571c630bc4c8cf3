"""Stable Diffusion 1 and 2: one CLIP encoder, whose last layer is read, and a UNet."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.denoise import Predict
from sglang_gen.families import autoencoder as autoencoder
from sglang_gen.families import img2img, prediction, text_encoding, unet_shared
from sglang_gen.families.contract import Request
from sglang_gen.models.unet import UNet
from sglang_gen.models.vae import Autoencoder
from sglang_gen.plan import image_size

NETWORK, REGIONS, build, sources, grids = (
    unet_shared.NETWORK,
    unet_shared.REGIONS,
    unet_shared.build,
    unet_shared.sources,
    unet_shared.grids,
)
schedule, draw, start, widest_map = unet_shared.schedule, unet_shared.draw, unet_shared.start, unet_shared.widest_map
skipped, SIZED_BY_PICTURE = unet_shared.skipped, unet_shared.SIZED_BY_PICTURE
TENSOR, SHARDING, latents_shape = unet_shared.TENSOR, unet_shared.SHARDING, unet_shared.latents_shape
default_size = image_size.configured_long_ago
guidance_scale = prediction.guidance_scale
encoding_dtype = decoding_dtype = autoencoder.own_dtype
TEXT_PARTS = ("text_encoder",)
MOST_TOKENS = None  # always as long as the tokenizer says
UNGUIDED = "there is no guidance at a scale of {scale}"
INEFFECTIVE_NEGATIVE = "The negative prompt has no effect at a guidance scale of {scale}"
ZERO_WITHOUT_NEGATIVE = False
SCHEDULER = {"steps_offset": 1, "clip_sample": False}  # whatever an old configuration says
STRENGTH = 0.8  # of the noise on an input picture, unless the request says otherwise


def encode(
    parts: Mapping[str, Any], diffusers_config: Mapping[str, Any], texts: list[str], length: int | None
) -> tuple[Tensor]:
    """Text `[B, T, C]`."""
    return (text_encoding.clip_last(*text_encoding.learned(parts, "", texts)),)


def encoded_shapes(configs: Mapping[str, Mapping[str, Any]], length: int | None) -> tuple[tuple[int, ...], ...]:
    """Shapes of what `encode` gives for one text, by the configs of the components."""
    return (unet_shared.text_shape(configs),)


def prepare(network: UNet, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor]]) -> Predict:
    """What predicts from the latents: the network with everything that all steps share."""
    return prediction.predictor(network, timesteps, *prediction.joined(encoded))


def encode_picture(
    vae: Autoencoder, pixels: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype
) -> Tensor:
    """Latents `[B, C, h, w]` of the picture `[1, 3, H, W]`, drawn for each sample."""
    return vae.config.scaling.factor * img2img.encode(vae, pixels, generators)


def decode(vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1."""
    return vae.decode(latents / vae.config.scaling.factor)
