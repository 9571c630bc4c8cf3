"""What the user typed, before it is composed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choices:
    """What the user typed, not yet composed. `seed` stands in where no seed is given (one for a whole sweep)."""

    overrides: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)  # config path -> typed value
    file: str | None = None
    config_dir: str | None = None
    config_name: str = "config"
    seed: int | None = None
