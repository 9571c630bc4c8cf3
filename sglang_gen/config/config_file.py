"""Reading `--config FILE`: flag names with underscores, nested group keys, or the record of an earlier run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_gen.config import prompt_archive, record_limits
from sglang_gen.config.flags import BY_KEY, FILE_OR_INLINE
from sglang_gen.config.schema import SCHEMA_VERSION, leaves
from sglang_gen.config.values import coerce, parse_json, parse_yaml
from sglang_gen.errors import UserError, nearest

# What a record pins: the choice that the run made where the request left it open.
PINNED = {
    "backend": "backend.name", "dtype": "dtype", "device": "device", "seed": "sampling.seed",
    "attention": "attention.backend",
}  # fmt: skip


@dataclass(frozen=True)
class FileValues:
    """What a configuration file says: typed values by config path, and options chosen for whole groups."""

    values: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)  # of the run that a record describes
    inputs: dict[str, str] = field(default_factory=dict)  # digests of its files, see `inputs`
    withheld: dict[str, Any] = field(default_factory=dict)  # what a record says and cannot decide, see `record_limits`


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a .json, .yaml or .yml file. Raises UserError with one sentence when there is none."""
    given, path = path, Path(os.path.expanduser(path))
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise UserError(f"'{given}' is not a .json, .yaml or .yml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"The file {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"The file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"The file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"The file {str(path)!r} cannot be read: {error}") from None
    try:
        content = parse_json(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"The file {path} holds no mapping of keys to values")
    return content


def typed(target: str, value: Any) -> Any:
    """`value` as the type of the config path `target`; a JSON setting may name a file that holds it.

    Raises UserError when such a file cannot be read, ValueError with half a sentence when the value does not fit.
    """
    kind = leaves()[target]
    if target in FILE_OR_INLINE and isinstance(value, os.PathLike):
        return coerce(read_mapping(os.fspath(value)), kind)
    if target in FILE_OR_INLINE and isinstance(value, str) and not value.lstrip().startswith("{"):
        return coerce(read_mapping(value), kind)
    return coerce(value, kind)


def read_config_file(path: str | Path) -> FileValues:
    """Values and group options of a configuration file. Raises UserError; unknown keys name the nearest legal one."""
    path = os.path.expanduser(path)
    content = read_mapping(path)
    if "schema_version" in content:
        return _read_record(content, path)
    return _collect(content, path)


def _read_record(record: Mapping[str, Any], path: str | Path) -> FileValues:
    version = record["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(f"{path} is a record of schema version {version}; this sglang-gen reads up to {SCHEMA_VERSION}")
    parts = {name: record.get(name) or {} for name in ("run", "effective", "sources", "versions", "inputs")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise UserError(f"{path}: '{name}' of the record is not a mapping")
    if not parts["run"]:
        raise UserError(f"{path} has a schema_version but no 'run': it is not the record of a run")
    found = _collect(parts["run"], path)
    record_limits.check_options(found.options, path)
    for target in [target for target in found.values if _is_nobodys(target, parts["sources"])]:
        del found.values[target]
    withheld = record_limits.withhold(found.values, path)
    if found.values.get("sampling.prompts_file"):
        found.values["sampling.prompts_file"] = prompt_archive.beside(path, found.values["sampling.prompts_file"])
    for name, target in PINNED.items():
        if parts["effective"].get(name) is not None and name not in _settled(found.values):
            found.values[target] = _typed(f"effective.{name}", target, parts["effective"][name], path)
    return FileValues(found.values, found.options, parts["versions"], parts["inputs"], withheld)


def _is_nobodys(target: str, sources: Mapping[str, Any]) -> bool:
    """Nobody stated these: a degree follows from the others, and the folder may be that of a sweep's job."""
    return target.startswith(("parallel.", "output.path")) and sources.get(target) == "default"


def _settled(values: Mapping[str, Any]) -> set[str]:
    """What the run's own settings give again, so that no choice of the record is needed."""
    found = {"dtype"} if values.get("compile.disable_autocast") else set()
    if values.get("attention.backend", "auto") != "auto" or values.get("attention.backend_config"):
        found.add("attention")
    return found


def _collect(content: Mapping[str, Any], path: str | Path) -> FileValues:
    kinds = leaves()
    groups = {*(name.partition(".")[0] for name in kinds if "." in name), "experiment"}
    found = FileValues()
    for key, value in content.items():
        key = str(key)
        if key in groups and isinstance(value, dict):
            _collect_group(key, value, found, path)
        elif key in groups and isinstance(value, str) and key not in BY_KEY:
            found.options[key] = value
        elif key == "config":
            raise UserError(f"{path}: a configuration file cannot name another with 'config'")
        elif key in BY_KEY:
            _set(found, key, str(BY_KEY[key].path), value, path)
        elif key in kinds:
            _set(found, key, key, value, path)
        elif key in groups:
            raise UserError(f"{path}: '{key}' takes the name of an option or a mapping of keys, not {value!r}")
        else:
            legal = [*BY_KEY, *groups, *kinds]
            raise UserError(f"{path}: unknown key '{key}'{nearest(key.replace('-', '_'), legal)}")
    return found


def _collect_group(group: str, values: Mapping[str, Any], found: FileValues, path: str | Path) -> None:
    kinds = leaves()
    for name, value in values.items():
        target = f"{group}.{name}"
        if target not in kinds:
            raise UserError(f"{path}: unknown key '{target}'{nearest(target, kinds)}")
        _set(found, target, target, value, path)


def _set(found: FileValues, key: str, target: str, value: Any, path: str | Path) -> None:
    if target in found.values:
        raise UserError(f"{path} gives {target} twice (as '{key}' and in another form)")
    found.values[target] = _typed(key, target, value, path)


def _typed(key: str, target: str, value: Any, path: str | Path) -> Any:
    try:
        return typed(target, value)
    except UserError:
        raise
    except ValueError as error:
        shown = "null" if value is None else f"'{value}'"
        raise UserError(f"{path}: {key}: {shown} {error}") from None
