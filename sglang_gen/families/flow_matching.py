"""Shared by the flow matching pipelines: timesteps, initial latents, image-to-image and decoding."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.errors import UserError, in_our_words
from sglang_gen.families import img2img
from sglang_gen.families.pipeline_contract import Pipeline, image_frames
from sglang_gen.models.vae import Autoencoder


def set_timesteps(scheduler: Any, steps: int, tokens: int, max_shift: float, sigmas: list[float] | None = None) -> None:
    """Set the scheduler's timesteps. A dynamic shift grows with the number of `tokens` (Esser et al. 2024, 5.3.2).

    `max_shift` is the default of a scheduler config without one. Raises UserError if the scheduler rejects the sigmas
    or the number of steps.
    """
    extra: dict[str, Any] = {}
    kind = type(scheduler).__name__
    config, parameters = scheduler.config, inspect.signature(scheduler.set_timesteps).parameters
    if config.get("use_dynamic_shifting"):
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
        slope = (high - low) / (many - few)
        extra["mu"] = tokens * slope + (low - slope * few)
    if "Flow" not in kind and not config.get("use_flow_sigmas"):
        raise UserError(f"{kind} does not integrate a flow (it has no use_flow_sigmas), so it cannot sample this model")
    if sigmas is not None and not config.get("use_flow_sigmas"):
        if "sigmas" not in parameters:
            raise UserError(f"{kind} takes no sigmas, so it cannot integrate this model's flow")
        extra["sigmas"] = sigmas
    else:
        extra["num_inference_steps"] = steps
    try:
        scheduler.set_timesteps(**extra)
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{kind} refuses {steps} steps: {in_our_words(error)}") from error


class FlowMatching(Pipeline):
    """Image-to-image, initial latents and decoding of the flow matching pipelines."""

    def skipped(self, steps: int, strength: float) -> int:
        """Steps that image-to-image skips at a noise `strength` in 0..1; a fraction of a step counts as a step."""
        return int(max(steps - min(steps * strength, steps), 0))

    def encode_image(
        self, vae: Autoencoder, pixels: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype
    ) -> Tensor:
        """Latents `[B, C, h, w]` of the image `[1, 3, H, W]`, sampled once per generator."""
        scaling = vae.config.scaling
        return (img2img.encode(vae, pixels, generators) - scaling.shift) * scaling.factor

    def start(self, scheduler: Any, timesteps: Tensor, noise: Tensor, source: Tensor | None) -> Tensor:
        """Initial latents `[B, C, h, w]`: noise, or the input image's latents `source` with noise added.

        Raises UserError if the scheduler cannot add noise to an image.
        """
        if source is None:
            return noise
        if not hasattr(scheduler, "scale_noise"):
            raise UserError(f"{type(scheduler).__name__} cannot add noise to an image, so it cannot start from one")
        return scheduler.scale_noise(source, timesteps[:1].repeat(len(noise)), noise).to(noise.dtype)

    def decode_scaled(self, vae: Autoencoder, latents: Tensor) -> Tensor:
        """Frames `[B, 1, H, W, 3]` in -1..1 from latents `[B, C, h, w]`."""
        scaling = vae.config.scaling
        return image_frames(vae.decode(latents / scaling.factor + scaling.shift))
