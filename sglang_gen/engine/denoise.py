"""Noise, guidance and the integration loop, around a function that predicts."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]  # (latents [B, ...], index of the timestep) -> prediction of the same shape


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): `uncond + scale * (text - uncond)`; 1 and below is none.

    `rescale` is how far its deviation is brought back to that of the text alone (Lin et al. 2023, section 3.4).
    """

    scale: float
    rescale: float = 0.0

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
        prediction = uncond + guidance.scale * (text - uncond)
        return _rescaled(prediction, text, guidance.rescale) if guidance.rescale > 0 else prediction

    return both if guidance.on else predict


def _rescaled(prediction: Tensor, text: Tensor, share: float) -> Tensor:
    deviations = [each.flatten(1).std(dim=1) for each in (text, prediction)]
    ratio = (deviations[0] / deviations[1]).view(-1, *[1] * (text.ndim - 1))
    return share * (prediction * ratio) + (1 - share) * prediction


def denoise(
    predict: Predict,
    scheduler: Any,
    timesteps: Tensor,
    steps: int,
    latents: Tensor,
    generators: Sequence[torch.Generator],
    after_step: Callable[[], None],
) -> Tensor:
    """Integrate to latents along the timesteps, which are those set on the scheduler or the last of them.

    A scheduler that draws noise gets the samples' own generators. One may evaluate more often than `steps`: Heun's
    twice in each, PNDM's once more in the first.
    """
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if "generator" in parameters else {}
    scales = hasattr(scheduler, "scale_model_input")
    evaluations, order = len(timesteps), getattr(scheduler, "order", 1)
    surplus = max(evaluations - steps * order, 0)
    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if scales else latents
        latents = scheduler.step(predict(scaled, index), timestep, latents, return_dict=False, **extra)[0]
        done = index + 1
        if done == evaluations or (done > surplus and done % order == 0):
            after_step()
    return latents
