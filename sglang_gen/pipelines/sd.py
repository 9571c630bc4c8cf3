"""Stable Diffusion 1 and 2: one CLIP encoder, whose last layer is read, and a UNet."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_gen.models.unet import Conditioning, UNet
from sglang_gen.pipelines import text, unet
from sglang_gen.pipelines.request import Request

NETWORK, REGIONS, build, sources, start = unet.NETWORK, unet.REGIONS, unet.build, unet.sources, unet.start
grids = unet.grids
TEXT_PARTS = ("text_encoder",)
MOST_TOKENS = None  # always as long as the tokenizer says
INEFFECTIVE_NEGATIVE = "The negative prompt has no effect at a guidance scale of {scale}"
ZERO_WITHOUT_NEGATIVE = False
SCHEDULER = {"steps_offset": 1, "clip_sample": False}  # whatever an old configuration says
SIZE = 64  # latents a side where a configuration of diffusers before 0.9 claims fewer


def branches(guidance: float, true_cfg: float, negative: bool) -> float:
    """The scale of classifier-free guidance."""
    return guidance


def encode(parts: Mapping[str, Any], texts: list[str], length: int | None) -> tuple[Tensor]:
    """Text `[B, T, C]`."""
    return (text.clip_last(parts["text_encoder"], parts["tokenizer"], texts),)


def default_size(diffusers_config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    size = diffusers_config["sample_size"]
    height, width = size if isinstance(size, Sequence) else (size, size)
    version = diffusers_config.get("_diffusers_version", "0.9").split(".")
    if (int(version[0]), int(version[1])) < (0, 9) and isinstance(size, int) and size < SIZE:
        height = width = SIZE
    return height * factor, width * factor


def prepare(network: UNet, scheduler: Any, request: Request, encoded: Sequence[tuple[Tensor]]) -> "partial[Tensor]":
    """What predicts from the latents: the network with everything that all steps share."""
    (states,) = (torch.cat(part) for part in zip(*encoded, strict=True))
    return partial(_predict, network, network.condition(scheduler.timesteps, states))


def _predict(network: UNet, conditioning: Conditioning, latents: Tensor, step: int) -> Tensor:
    return network(latents, conditioning, step)


def decode(vae: Any, latents: Tensor, request: Request) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1."""
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
