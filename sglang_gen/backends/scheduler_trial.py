"""Runs a scheduler through its steps before a weight is read, with numbers in place of a network's predictions."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sglang_gen import log
from sglang_gen.engine.denoise import denoise
from sglang_gen.errors import UserError

TRIAL_SHAPE = (1, 4, 2, 2)


def check_steps(scheduler: Any, timesteps: Tensor) -> None:
    """Refuse a configuration with which the scheduler leaves its own tables. Raises UserError.

    Every step is made. Such configurations fail in the last step or, with noise levels that are spaced otherwise than
    the timesteps, find no timestep for a noise level. `scheduler` has its timesteps set and is not changed.
    """
    latents, generators = torch.ones(TRIAL_SHAPE), [torch.Generator().manual_seed(0)]
    numbers = range(len(timesteps))
    try:
        trial = copy.deepcopy(scheduler)
        denoise(lambda latents, index: 0.5 * latents, trial, timesteps, numbers, latents, generators, lambda: None)
    except IndexError as error:
        raise UserError(
            f"{type(scheduler).__name__} finds no noise level for one of its {len(timesteps)} steps with this "
            f"configuration{_spacing(scheduler)}: change the number of steps or the spacing of its noise levels"
        ) from error


def warn_changed(scheduler: Any, settings: Mapping[str, Any], steps: int) -> None:
    """Warn of settings that the scheduler replaced when it set its timesteps."""
    kind = type(scheduler).__name__
    for name, value in settings.items():
        used = scheduler.config.get(name, value)
        if not name.startswith("_") and used != value and not isinstance(value, (list, tuple)):
            log.warn_once(f"{kind} runs {steps} steps with {name}={used} in place of {value}")


def _spacing(scheduler: Any) -> str:
    """The settings that space the noise levels, in brackets; empty if the scheduler has none."""
    config = scheduler.config
    switches = [name for name in config if name.startswith("use_") and config[name]]
    names = [name for name in ("beta_schedule", "timestep_spacing", *switches) if name in config]
    settings = ", ".join(f"{name} {config[name]}" for name in names)
    return f" ({settings})" if settings else ""
