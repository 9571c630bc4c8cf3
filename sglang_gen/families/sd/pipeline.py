"""Stable Diffusion 1 and 2: the last hidden state of one CLIP encoder conditions a UNet."""

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
skipped, SIZED_BY_IMAGE = unet_shared.skipped, unet_shared.SIZED_BY_IMAGE
TENSOR, SHARDING, latents_shape = unet_shared.TENSOR, unet_shared.SHARDING, unet_shared.latents_shape
default_size = image_size.configured_long_ago
guidance_scale = prediction.guidance_scale
encoding_dtype = decoding_dtype = autoencoder.own_dtype
TEXT_ENCODER_NAMES = ("text_encoder",)
MOST_TOKENS = None  # prompts always have the tokenizer's length
UNGUIDED = "there is no guidance at a scale of {scale}"
INEFFECTIVE_NEGATIVE = "The negative prompt has no effect at a guidance scale of {scale}"
ZERO_WITHOUT_NEGATIVE = False
SCHEDULER = {"steps_offset": 1, "clip_sample": False}  # override outdated values in old scheduler configs
STRENGTH = 0.8  # default noise strength of image-to-image


def encode(
    components: Mapping[str, Any], diffusers_config: Mapping[str, Any], texts: list[str], length: int | None
) -> tuple[Tensor]:
    """CLIP hidden states `[B, T, C]`."""
    return (text_encoding.clip_last(*text_encoding.encoder_inputs(components, "", texts)),)


def encoded_shapes(configs: Mapping[str, Mapping[str, Any]], length: int | None) -> tuple[tuple[int, ...], ...]:
    """Shapes of the outputs of `encode` for one text, without the batch dimension, from the component configs."""
    return (unet_shared.text_shape(configs),)


def prepare(network: UNet, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor]]) -> Predict:
    """The network as a predictor, with the conditioning of all steps computed once."""
    return prediction.predictor(network, timesteps, *prediction.joined(encoded))


def encode_image(vae: Autoencoder, pixels: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """Latents `[B, C, h, w]` of the image `[1, 3, H, W]`, sampled once per generator."""
    return vae.config.scaling.factor * img2img.encode(vae, pixels, generators)


def decode(vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
    """Images `[B, 3, H, W]` in -1..1."""
    return vae.decode(latents / vae.config.scaling.factor)
