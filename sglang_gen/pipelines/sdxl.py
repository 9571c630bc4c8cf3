"""Stable Diffusion XL (Podell et al. 2023): two CLIP encoders, sizes as an input, a UNet."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.utils import is_invisible_watermark_available
from torch import Tensor

from sglang_gen.models.unet import Conditioning, UNet
from sglang_gen.pipelines import text, unet
from sglang_gen.pipelines.request import Request

NETWORK, REGIONS, build, sources = unet.NETWORK, unet.REGIONS, unet.build, unet.sources
grids = unet.grids
TEXT_PARTS = ("text_encoder", "text_encoder_2")
MOST_TOKENS = None  # always as long as the tokenizers say
INEFFECTIVE_NEGATIVE = "The negative prompt has no effect at a guidance scale of {scale}"
ZERO_WITHOUT_NEGATIVE = True  # unless model_index.json says otherwise in force_zeros_for_empty_prompt
SCHEDULER: Mapping[str, Any] = {}


def branches(guidance: float, true_cfg: float, negative: bool) -> float:
    """The scale of classifier-free guidance."""
    return guidance


def encode(parts: Mapping[str, Any], texts: list[str], length: int | None) -> tuple[Tensor, Tensor]:
    """Text `[B, T, C]`: the last layer but one of both encoders side by side; pooled text `[B, P]` of the second."""
    first, _ = text.clip(parts["text_encoder"], parts["tokenizer"], texts)
    second, pooled = text.clip(parts["text_encoder_2"], parts["tokenizer_2"], texts)
    return torch.cat([first, second], dim=-1), pooled


def default_size(diffusers_config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    size = int(diffusers_config["sample_size"]) * factor
    return size, size


def start(
    diffusers_config: Mapping[str, Any],
    scheduler: Any,
    request: Request,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype,
) -> Tensor:
    """Set the timesteps, of which the first is step 0 even where it stands twice, and draw the noise `[B, C, h, w]`."""
    noise = unet.start(diffusers_config, scheduler, request, generators, dtype)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return noise


def prepare(
    network: UNet, scheduler: Any, request: Request, encoded: Sequence[tuple[Tensor, Tensor]]
) -> "partial[Tensor]":
    """What predicts from the latents: the network with everything that all steps share."""
    states, pooled = (torch.cat(part) for part in zip(*encoded, strict=True))
    size = (request.height, request.width)
    sizes = states.new_tensor([*size, 0, 0, *size])  # of the original, of the crop's corner, of what is wanted
    conditioning = network.condition(scheduler.timesteps, states, pooled, sizes.expand(len(states), -1))
    return partial(_predict, network, conditioning)


def _predict(network: UNet, conditioning: Conditioning, latents: Tensor, step: int) -> Tensor:
    return network(latents, conditioning, step)


def decode(vae: Any, latents: Tensor, request: Request) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1. An autoencoder that overflows in float16 is at work in float32."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    pictures: Tensor = vae.decode(_unscaled(vae, latents.to(vae.dtype)), return_dict=False)[0]
    if upcast:
        vae.to(torch.float16)
    return _marked(pictures)


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return latents / vae.config.scaling_factor
    mean, deviation = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, deviation))
    return latents * deviation / vae.config.scaling_factor + mean


def _marked(pictures: Tensor) -> Tensor:
    """With the invisible watermark of diffusers' pipeline, which it sets wherever the library for it is installed."""
    if not is_invisible_watermark_available():
        return pictures
    from diffusers.pipelines.stable_diffusion_xl.watermark import StableDiffusionXLWatermarker

    return StableDiffusionXLWatermarker().apply_watermark(pictures)
