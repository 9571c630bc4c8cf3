"""Restricts the code that Hydra's configuration may name to classes of installed plugins and of this package.

Hydra instantiates each `_target_` in `hydra.launcher`, `hydra.sweeper` and `hydra.callbacks`, at any depth, and passes
its logging configuration to `logging.config`, which calls the values of `class` and `()`. Configuration files may come
from untrusted sources, so both are checked before anything is imported. The input is the composed configuration as
plain data, with unresolved interpolations.
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
JOB_FOLDER = "${hydra.runtime.output_dir}/"  # Hydra sets it to an absolute path when a job runs
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
TRUSTED_PACKAGES = ("hydra", "hydra_plugins", "sglang_gen")
PACKAGE = re.compile(rf"({'|'.join(TRUSTED_PACKAGES)})([./][A-Za-z0-9]\w*)*/?")  # not __main__: its import starts a run
OURS = "sglang_gen.sweep.callback.SweepTable"
TEXT = re.compile(r"\$\{(oc\.env|now):[^{}]*\}|(\$\{[^{}]*\}[^${}]*){2,}")  # interpolations that resolve to text
REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


def check_targets(config: Mapping[str, Any], installed: Collection[str]) -> None:
    """Raises UserError for a class that is neither in `installed` nor allowed in a logging configuration."""
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
    """Raises UserError if Hydra's own files would be written outside the job's folder, where they replace others."""
    if name is not None and (Path(str(name)).is_absolute() or ".." in Path(str(name)).parts or "${" in str(name)):
        raise UserError(f"hydra.output_subdir is {name}; it must be the name of a folder in the job's own")


def _check_text(where: str, text: str) -> None:
    """Raises UserError for a string in a logging configuration that names an object, or may do so once resolved."""
    if text.startswith(("ext://", "cfg://")) and text not in STREAMS:
        raise UserError(f"{where} is {text}: logging takes {' and '.join(STREAMS)} and no other object")
    if "${" in text and not (where.startswith("hydra.job_logging.") and text.startswith(JOB_FOLDER)):
        raise UserError(f"{where} is {text}: logging of jobs takes {JOB_FOLDER}... and no other interpolation")


def _walk(value: Any, where: str, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of every scalar in `value`, and of mappings and lists in place of a class name."""
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
    """Raises UserError for an interpolation that may resolve to a mapping, whose classes were not checked."""
    chain: list[str] = []
    while isinstance(value, str) and value.startswith("${") and value.endswith("}") and not TEXT.fullmatch(value):
        reference = REFERENCE.fullmatch(value)
        chain.append(value)
        value = _at(config, reference[1]) if reference and chain.count(value) == 1 else {}
    if chain and isinstance(value, (Mapping, list)):
        raise UserError(f"{where} is {chain[0]}, which may be a mapping: write the value in place of the interpolation")


def _at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a config path; None if there is none, {} if an interpolation stands in place of a parent."""
    value: Any = config
    for name in path.split("."):
        if isinstance(value, str):
            return {}
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def check_search_path(entries: Any) -> None:
    """Raises UserError for an entry of hydra.searchpath that would import an untrusted package."""
    for entry in entries if isinstance(entries, (list, tuple)) else ():
        scheme, separator, name = str(entry).partition("://")
        if separator and scheme == "pkg" and not PACKAGE.fullmatch(name):
            raise UserError(
                f"hydra.searchpath: {entry} would import {name or 'a package'}; name its folder, as file://..."
            )
