"""Image-to-image (SDEdit, Meng et al. 2022): denoising starts from an input image with noise added."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.errors import UserError
from sglang_gen.models.vae import Autoencoder
from sglang_gen.types import Size


def size(image: Any, factor: int) -> Size:
    """Size of `image`, rounded down to multiples of `factor` pixels; used if no size was requested.

    Raises UserError for an image smaller than one latent.
    """
    width, height = (side - side % factor for side in image.size)
    if not (height and width):
        raise UserError(
            f"--image-path: the image is {image.width} x {image.height} pixels; this model takes {factor} x {factor} "
            "or more"
        )
    return Size(height, width)


def pixels(image: Any, factor: int, size: Size) -> Tensor:
    """The image as `[1, 3, H, W]` in -1..1, resized as in diffusers' pipelines."""
    from diffusers.image_processor import VaeImageProcessor  # a slow import that text-to-image does not need

    processed: Tensor = VaeImageProcessor(vae_scale_factor=factor).preprocess(image, size.height, size.width)
    return processed


def encode(vae: Autoencoder, image: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Unscaled latents `[B, C, h, w]` of one image `[1, 3, H, W]`; row i is sampled with generator i."""
    parameter = next(vae.parameters())
    posterior = vae.encode(image.to(parameter.device, parameter.dtype))
    return torch.cat([posterior.sample(generator) for generator in generators])


def check_strength(strength: Any, steps: int, skipped: Callable[[int, float], int]) -> None:
    """Raises UserError for a strength outside 0..1, or one that leaves no step to run."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise UserError(f"--diffusers-kwargs: 'strength' is {strength!r}; it must lie between 0 and 1")
    if skipped(steps, strength) == steps:
        raise no_steps_left(strength, steps)


def no_steps_left(strength: float, steps: int) -> UserError:
    """The error for a strength that leaves no step to run."""
    return UserError(
        f"A strength of {strength} leaves none of {steps} steps; raise --num-inference-steps, or the strength with "
        """--diffusers-kwargs '{"strength": 0.6}'"""
    )


def remaining_timesteps(scheduler: Any, skipped: int | None) -> Tensor:
    """The timesteps left after skipping `skipped` steps (None: all); sets the scheduler's begin index to the first."""
    if skipped is None:
        timesteps: Tensor = scheduler.timesteps
        return timesteps
    first = skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]
