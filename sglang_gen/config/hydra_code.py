"""Where Hydra's own configuration names code, and which it may name: classes of installed plugins and ours, no others.

Hydra instantiates what `hydra.launcher`, `hydra.sweeper` and `hydra.callbacks` name as `_target_`, at any depth, and
hands its logging to `logging.config`, which calls what `class` and `()` name. A folder of configuration files may be a
stranger's, so that both are checked before anything is imported. In: the composed configuration as plain data, its
interpolations as text.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError

INSTANTIATED = ("launcher", "sweeper", "callbacks")
CALLED_KEYS = ("_target_", "class", "()")  # keys whose values are called
LOGGING = ("hydra_logging", "job_logging")
LOGGING_CLASSES = (
    "logging.Formatter", "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler",
    "logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler",
)  # fmt: skip
JOB_FOLDER = "${hydra.runtime.output_dir}/"  # an absolute path, whatever the configuration says, once a job runs
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
TRUSTED_PACKAGES = ("hydra", "hydra_plugins", "sglang_gen")
PACKAGE = re.compile(rf"({'|'.join(TRUSTED_PACKAGES)})([./][A-Za-z0-9]\w*)*/?")  # not __main__, whose import is a run
OURS = "sglang_gen.sweep.callback.SweepTable"
TEXT = re.compile(r"\$\{(oc\.env|now):[^{}]*\}|(\$\{[^{}]*\}[^${}]*){2,}")  # interpolations that are never a mapping
REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


def check(config: Mapping[str, Any], installed: Collection[str]) -> None:
    """Raises UserError for a name of code that is neither in `installed` nor allowed in a logging configuration."""
    hydra = config["hydra"]
    _check_folder(hydra.get("output_subdir"))
    for name in INSTANTIATED:
        for where, key, value in _walk(hydra.get(name), f"hydra.{name}"):
            if key == "_target_" and str(value) not in installed:
                raise UserError(
                    f"{where} is {value}: only classes of installed Hydra plugins and of sglang_gen are taken"
                )
            _check_reference(where, value, config)
    for name in LOGGING:
        for where, key, value in _walk(hydra.get(name), f"hydra.{name}"):
            if key in CALLED_KEYS and str(value) not in (*LOGGING_CLASSES, *installed):
                raise UserError(f"{where} is {value}: logging takes {', '.join(LOGGING_CLASSES)} and no other class")
            _check_text(where, str(value))


def _check_folder(name: Any) -> None:
    """Raises UserError for a folder of Hydra's own files outside of the job's: they replace others of their names."""
    if name is not None and (Path(str(name)).is_absolute() or ".." in Path(str(name)).parts or "${" in str(name)):
        raise UserError(f"hydra.output_subdir is {name}; it must be the name of a folder in the job's own")


def _check_text(where: str, text: str) -> None:
    """Raises UserError for a text of a logging configuration that names an object, or may do so once it is resolved."""
    if text.startswith(("ext://", "cfg://")) and text not in STREAMS:
        raise UserError(f"{where} is {text}: logging takes {' and '.join(STREAMS)} and no other object")
    if "${" in text and not (where.startswith("hydra.job_logging.") and text.startswith(JOB_FOLDER)):
        raise UserError(f"{where} is {text}: logging of jobs takes {JOB_FOLDER}... and no other interpolation")


def _walk(value: Any, where: str, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every value inside: its path, its own key, and itself. Mappings and lists only where they stand for a name."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name in CALLED_KEYS and isinstance(item, (Mapping, list)):
                yield f"{where}.{name}", name, item
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
        if separator and scheme == "pkg" and not PACKAGE.fullmatch(name):
            raise UserError(
                f"hydra.searchpath: {entry} would import {name or 'a package'}; name its folder, as file://..."
            )
