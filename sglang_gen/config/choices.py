"""The user's choices, before composition."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choices:
    """Overrides, flags and files given by the user. `seed` applies if none is given, so that a sweep shares one."""

    overrides: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)  # config path -> typed value
    file: str | None = None
    config_dir: str | None = None
    config_name: str = "config"
    seed: int | None = None
