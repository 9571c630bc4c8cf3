"""Where Hydra's own configuration names code, and which it may name: classes of installed plugins and ours, no others.

Hydra instantiates what `hydra.launcher`, `hydra.sweeper` and `hydra.callbacks` name as `_target_`, at any depth, and
hands its logging to `logging.config`, which calls what `class` and `()` name. A folder of configuration files may be a
stranger's, so that both are checked before anything is imported. In: the composed configuration as plain data, its
interpolations as text.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sglang_gen.errors import UserError

INSTANTIATED = ("launcher", "sweeper", "callbacks")
LOGGING = ("hydra_logging", "job_logging")
LOGGING_CLASSES = (
    "logging.Formatter", "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler",
    "logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler",
)  # fmt: skip
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
PACKAGES = ("hydra", "hydra_plugins", "sglang_gen")
OURS = "sglang_gen.sweep.callback.SweepTable"
TEXT = re.compile(r"\$\{(oc\.env|now):[^{}]*\}|(\$\{[^{}]*\}[^${}]*){2,}")  # interpolations that are never a mapping
REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


def check(config: Mapping[str, Any], installed: Collection[str]) -> None:
    """Raises UserError for a name of code that is neither in `installed` nor allowed in a logging configuration."""
    hydra = config["hydra"]
    for name in INSTANTIATED:
        for where, key, value in _walk(hydra.get(name), f"hydra.{name}"):
            if key == "_target_" and value not in installed:
                raise UserError(
                    f"{where} is {value}: only classes of installed Hydra plugins and of sglang_gen are taken"
                )
            _check_reference(where, value, config)
    for name in LOGGING:
        for where, key, value in _walk(hydra.get(name), f"hydra.{name}"):
            if key in ("class", "()", "_target_") and value not in (*LOGGING_CLASSES, *installed):
                raise UserError(f"{where} is {value}: logging takes {', '.join(LOGGING_CLASSES)} and no other class")
            if isinstance(value, str) and value.startswith(("ext://", "cfg://")) and value not in STREAMS:
                raise UserError(f"{where} is {value}: logging takes {' and '.join(STREAMS)} and no other object")
            _check_reference(where, value, config)


def _walk(value: Any, where: str, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value inside, mappings and lists themselves aside: its path, its own key, and itself."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _walk(item, f"{where}.{name}", str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{where}[{index}]")
    else:
        yield where, key, value


def _check_reference(where: str, value: Any, config: Mapping[str, Any]) -> None:
    """Raises UserError for an interpolation that may stand for a mapping, whose classes were not looked at."""
    chain: list[str] = []
    while isinstance(value, str) and value.startswith("${") and value.endswith("}") and not TEXT.fullmatch(value):
        found = REFERENCE.fullmatch(value)
        chain.append(value)
        value = _at(config, found[1]) if found and chain.count(value) == 1 else {}
    if chain and isinstance(value, (Mapping, list)):
        raise UserError(f"{where} is {chain[0]}, which may be a mapping: write out here what it stands for")


def _at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a config path; None where there is none, and a mapping where an interpolation is on the way."""
    value: Any = config
    for name in path.split("."):
        if isinstance(value, str):
            return {}
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def check_search_path(entries: Any) -> None:
    """Raises UserError for a package in hydra.searchpath that would be imported for it."""
    for entry in entries if isinstance(entries, (list, tuple)) else ():
        scheme, separator, name = str(entry).partition("://")
        if separator and scheme == "pkg" and re.split(r"[./]", name)[0] not in PACKAGES:
            raise UserError(
                f"hydra.searchpath: {entry} would import {name or 'a package'}; name its folder, as file://..."
            )
