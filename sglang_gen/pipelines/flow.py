"""Timesteps of flow matching schedulers."""

import inspect
from typing import Any

from sglang_gen.errors import UserError


def set_timesteps(scheduler: Any, steps: int, tokens: int, max_shift: float, sigmas: list[float] | None = None) -> None:
    """With dynamic shifting the shift grows with the number of tokens (Esser et al. 2024, section 5.3.2).

    `max_shift` is what a scheduler takes that does not say. Raises UserError for one that cannot take the sigmas.
    """
    extra: dict[str, Any] = {}
    config, parameters = scheduler.config, inspect.signature(scheduler.set_timesteps).parameters
    if config.get("use_dynamic_shifting"):
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
        slope = (high - low) / (many - few)
        extra["mu"] = tokens * slope + (low - slope * few)
    if sigmas is None or config.get("use_flow_sigmas"):
        scheduler.set_timesteps(steps, **extra)
        return
    if "sigmas" not in parameters:
        raise UserError(f"{type(scheduler).__name__} takes no sigmas, so it cannot integrate this model's flow")
    scheduler.set_timesteps(sigmas=sigmas, **extra)
