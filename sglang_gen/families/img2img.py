"""Image to image (SDEdit, Meng et al. 2022): a run that starts from a picture, noised to a step of the schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.errors import UserError
from sglang_gen.models.vae import Autoencoder


def size(image: Any, factor: int) -> tuple[int, int]:
    """Height and width that a picture without a wanted size is given: its own, down to multiples of `factor` pixels.

    Raises UserError for a picture that is smaller than one latent.
    """
    width, height = (side - side % factor for side in image.size)
    if not (height and width):
        raise UserError(
            f"--image-path: the picture is {image.width} x {image.height} pixels; this model takes {factor} x {factor} "
            "or more"
        )
    return height, width


def pixels(image: Any, factor: int, height: int, width: int) -> Tensor:
    """The picture as `[1, 3, height, width]` in -1..1, resized as diffusers' pipelines do it."""
    from diffusers.image_processor import VaeImageProcessor  # only a run with a picture pays for it

    processed: Tensor = VaeImageProcessor(vae_scale_factor=factor).preprocess(image, height, width)
    return processed


def encode(vae: Autoencoder, picture: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Latents `[B, C, h, w]`, not yet scaled, of one picture `[1, 3, H, W]`: row i drawn by generator i."""
    posterior = vae.encode(picture.to(vae.encoder.conv_in.weight))
    return torch.cat([posterior.sample(generator) for generator in generators])


def check_strength(strength: Any, steps: int, skipped: Callable[[int, float], int]) -> None:
    """Raises UserError for a strength that is not between 0 and 1, or that leaves none of the steps."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise UserError(f"--diffusers-kwargs: 'strength' is {strength!r}; it must lie between 0 and 1")
    if skipped(steps, strength) == steps:
        raise none_left(strength, steps)


def none_left(strength: float, steps: int) -> UserError:
    """The refusal of a strength that leaves no step."""
    return UserError(
        f"A strength of {strength} leaves none of {steps} steps; raise --num-inference-steps, or the strength with "
        """--diffusers-kwargs '{"strength": 0.6}'"""
    )


def kept(scheduler: Any, skipped: int | None) -> Tensor:
    """The timesteps that are run through, with the scheduler at the first of them; all where there is no picture."""
    if skipped is None:
        timesteps: Tensor = scheduler.timesteps
        return timesteps
    first = skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]
