"""Noise and the integration loop, around a function that predicts."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]  # (latents [B, ...], index of the timestep) -> prediction of the same shape


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """`[B, *shape]`, row i from generator i on the CPU, so that a picture depends on its seed alone."""
    return torch.cat([torch.randn((1, *shape), generator=generator, dtype=dtype) for generator in generators])


def step_numbers(evaluations: int, steps: int, order: int) -> list[int]:
    """The step that each evaluation of the network belongs to, from 0.

    A scheduler may evaluate more often than `steps`: Heun's twice in each, PNDM's once more in the first.
    """
    surplus = max(evaluations - steps * order, 0)
    return [max(index - surplus, 0) // order for index in range(evaluations)]


def denoise(
    predict: Predict,
    scheduler: Any,
    timesteps: Tensor,
    numbers: Sequence[int],
    latents: Tensor,
    generators: Sequence[torch.Generator],
    after_step: Callable[[], None],
) -> Tensor:
    """Integrate to latents along the timesteps, which are those set on the scheduler or the last of them.

    A scheduler that draws noise draws it from the samples' own generators. `numbers` are those of `step_numbers`; what
    follows the last evaluation of a step is `after_step`.
    """
    extra = _arguments(scheduler, latents, generators)
    scales = hasattr(scheduler, "scale_model_input")
    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if scales else latents
        latents = scheduler.step(predict(scaled, index), timestep, latents, return_dict=False, **extra)[0]
        if index + 1 == len(numbers) or numbers[index + 1] != numbers[index]:
            after_step()
    return latents


def _arguments(scheduler: Any, latents: Tensor, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Arguments of `step`: no noise of `eta`, the samples' generators for a scheduler that draws some all the same."""
    set_noise_sampler(scheduler, latents, generators)
    taken = inspect.signature(scheduler.step).parameters
    known = {"eta": 0.0, "generator": list(generators)}  # what diffusers' pipelines give, where their caller does not
    return {name: value for name, value in known.items() if name in taken}


def set_noise_sampler(scheduler: Any, latents: Tensor, generators: Sequence[torch.Generator]) -> None:
    """Give a scheduler that draws from Brownian motions one for each sample of a new batch, from the sample's seed.

    Where `step` takes generators the scheduler makes them from those, but it would keep the ones of an earlier batch.
    """
    if not hasattr(scheduler, "noise_sampler"):
        return
    if "generator" in inspect.signature(scheduler.step).parameters:
        scheduler.noise_sampler = None
    else:
        scheduler.noise_sampler = _brownian(scheduler.sigmas, latents, [each.initial_seed() for each in generators])


def _brownian(sigmas: Tensor, latents: Tensor, seeds: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Noise `[B, ...]` between two sigmas, drawn on the CPU whatever the device of the latents."""
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler  # needs torchsde

    least, most = sigmas[sigmas > 0].min().item(), sigmas.max().item()
    motion = BrownianTreeNoiseSampler(latents.cpu(), least, most, seeds)

    def draw(sigma: Tensor, following: Tensor) -> Tensor:
        noise: Tensor = motion(sigma, following)
        return noise.to(latents.device)

    return draw
