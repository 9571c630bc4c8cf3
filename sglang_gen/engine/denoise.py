"""Initial noise and the sampling loop."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.host_copies import pinned_copies

Predict = Callable[[Tensor, int], Tensor]  # (latents [B, ...], index of the timestep) -> prediction of the same shape


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """Noise `[B, *shape]`; row i comes from CPU generator i, so an image depends only on its own seed."""
    rows = [torch.randn((1, *shape), generator=generator, dtype=dtype, device="cpu") for generator in generators]
    return torch.cat(rows)


def step_numbers(evaluations: int, steps: int, order: int) -> list[int]:
    """The step that each evaluation of the network belongs to, from 0.

    A scheduler may need more evaluations than steps: Heun's method two per step, PNDM an extra one in the first step.
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
    """Denoise `latents` `[B, ...]` along `timesteps`: all that are set on the scheduler, or the last of them.

    A stochastic scheduler draws from the samples' own generators. `numbers` is the result of `step_numbers`;
    `after_step` is called after the last evaluation of each step.
    """
    extra = _arguments(scheduler, latents, generators)
    scales = hasattr(scheduler, "scale_model_input")
    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if scales else latents
        prediction = predict(scaled, index)
        with pinned_copies(latents.device):
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
        if index + 1 == len(numbers) or numbers[index + 1] != numbers[index]:
            after_step()
    return latents


def _arguments(scheduler: Any, latents: Tensor, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Extra arguments of `scheduler.step`, if it has these parameters: eta 0 and the samples' generators."""
    set_noise_sampler(scheduler, latents, generators)
    parameters = inspect.signature(scheduler.step).parameters
    known = {"eta": 0.0, "generator": list(generators)}  # the defaults of diffusers' pipelines
    return {name: value for name, value in known.items() if name in parameters}


def set_noise_sampler(scheduler: Any, latents: Tensor, generators: Sequence[torch.Generator]) -> None:
    """For a scheduler with a Brownian noise sampler: create one for a new batch, seeded by the samples' seeds.

    If `step` takes generators, the scheduler creates it from those; only the one of an earlier batch is removed.
    """
    if not hasattr(scheduler, "noise_sampler"):
        return
    if "generator" in inspect.signature(scheduler.step).parameters:
        scheduler.noise_sampler = None
    else:
        scheduler.noise_sampler = _brownian(scheduler.sigmas, latents, [each.initial_seed() for each in generators])


def _brownian(sigmas: Tensor, latents: Tensor, seeds: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Noise sampler: (sigma, next sigma) -> noise `[B, ...]`, drawn on the CPU and moved to the latents' device."""
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler  # needs torchsde

    least, most = sigmas[sigmas > 0].min().item(), sigmas.max().item()
    motion = BrownianTreeNoiseSampler(torch.empty_like(latents, device="cpu"), least, most, seeds)  # reads the shape

    def draw(sigma: Tensor, following: Tensor) -> Tensor:
        noise: Tensor = motion(sigma, following)
        return noise.to(latents.device)

    return draw
