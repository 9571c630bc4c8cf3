"""Noise, guidance and the integration loop, around a function that predicts."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]  # (latents [B, ...], step) -> prediction of the same shape


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): `uncond + scale * (text - uncond)`; 1 and below is none."""

    scale: float

    @property
    def on(self) -> bool:
        return self.scale > 1


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """`[B, *shape]`, row i from generator i on the CPU, so that a picture depends on its seed alone."""
    return torch.cat([torch.randn((1, *shape), generator=generator, dtype=dtype) for generator in generators])


def guided(predict: Predict, guidance: Guidance) -> Predict:
    """Both branches in one batch `[2 B, ...]`, without the text first."""

    def both(latents: Tensor, step: int) -> Tensor:
        uncond, text = predict(torch.cat([latents, latents]), step).chunk(2)
        return uncond + guidance.scale * (text - uncond)

    return both if guidance.on else predict


def denoise(
    predict: Predict,
    scheduler: Any,
    latents: Tensor,
    generators: Sequence[torch.Generator],
    after_step: Callable[[], None],
) -> Tensor:
    """Integrate from noise to latents along the scheduler's timesteps, which have been set.

    A scheduler that draws noise gets the samples' own generators.
    """
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if "generator" in parameters else {}
    scales = hasattr(scheduler, "scale_model_input")
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if scales else latents
        latents = scheduler.step(predict(scaled, step), timestep, latents, return_dict=False, **extra)[0]
        after_step()
    return latents
