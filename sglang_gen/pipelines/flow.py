"""Timesteps of flow matching schedulers."""

from typing import Any


def set_timesteps(scheduler: Any, steps: int, tokens: int, sigmas: Any = None) -> None:
    """With dynamic shifting the shift grows with the number of tokens (Esser et al. 2024, section 5.3.2)."""
    extra: dict[str, Any] = {} if sigmas is None else {"sigmas": sigmas}
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
        slope = (high - low) / (many - few)
        extra["mu"] = tokens * slope + (low - slope * few)
    if sigmas is None:
        scheduler.set_timesteps(steps, **extra)
    else:
        scheduler.set_timesteps(**extra)
