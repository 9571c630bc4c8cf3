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
from sglang_gen.errors import InvalidValueError, UserError, nearest

# Effective values of a record, and the config paths that they set if the request left the choice open.
PINNED = {
    "backend": "backend.name", "dtype": "dtype", "device": "device", "seed": "sampling.seed",
    "attention": "attention.backend", "float32_matmul": "backend.float32_matmul",
}  # fmt: skip


@dataclass(frozen=True)
class FileValues:
    """Contents of a configuration file: typed values by config path, and options of groups."""

    values: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)  # package versions of a recorded run
    inputs: dict[str, str] = field(default_factory=dict)  # digests of its input files, see `outputs.input_digests`
    withheld: dict[str, Any] = field(default_factory=dict)  # values that a record may not set, see `record_limits`


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a .json, .yaml or .yml file. Raises UserError if the file holds none."""
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
    except ValueError:
        raise UserError(f"The file {str(path)!r} cannot be read: its name holds a zero byte") from None
    try:
        content = parse_json(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except InvalidValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"The file {path} holds no mapping of keys to values")
    return content


def typed(target: str, value: Any) -> Any:
    """Convert `value` to the type of the config path `target`. For JSON settings it may be the name of a file.

    Raises UserError if that file cannot be read, InvalidValueError with a clause ("is not an integer") for a wrong
    type.
    """
    kind = leaves()[target]
    if target in FILE_OR_INLINE and isinstance(value, os.PathLike):
        return coerce(read_mapping(os.fspath(value)), kind)
    if target in FILE_OR_INLINE and isinstance(value, str) and not value.lstrip().startswith("{"):
        return coerce(read_mapping(value), kind)
    return coerce(value, kind)


def read_config_file(path: str | Path) -> FileValues:
    """Read the values and group options of a configuration file. Raises UserError, which suggests legal keys."""
    path = os.path.expanduser(path)
    content = read_mapping(path)
    if "schema_version" in content:
        return _read_record(content, path)
    return _collect(content, path)


def _read_record(record: Mapping[str, Any], path: str | Path) -> FileValues:
    version = record["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(f"{path} is a record of schema version {version}; this sglang-gen reads up to {SCHEMA_VERSION}")
    sections = {name: record.get(name) or {} for name in ("run", "effective", "sources", "versions", "inputs")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: '{name}' of the record is not a mapping")
    if not sections["run"]:
        raise UserError(f"{path} has a schema_version but no 'run': it is not the record of a run")
    content = _collect(sections["run"], path)
    values, effective = content.values, sections["effective"]
    record_limits.check_options(content.options, path)
    for target in [target for target in values if _is_derived(target, sections["sources"])]:
        del values[target]
    withheld = record_limits.withhold(values, path)
    if values.get("sampling.prompts_file"):
        values["sampling.prompts_file"] = prompt_archive.beside(path, values["sampling.prompts_file"])
    for name, target in PINNED.items():
        if effective.get(name) is not None and name not in _settled(values):
            values[target] = _typed(f"effective.{name}", target, effective[name], path)
    return FileValues(values, content.options, sections["versions"], sections["inputs"], withheld)


def _is_derived(target: str, sources: Mapping[str, Any]) -> bool:
    """Whether a recorded value was not set explicitly: an inferred degree, or the output folder of a sweep's job."""
    return target.startswith(("parallel.", "output.path")) and sources.get(target) == "default"


def _settled(values: Mapping[str, Any]) -> set[str]:
    """Names in `PINNED` that the run's own settings determine, so that the recorded choice is not needed."""
    names = {"dtype"} if values.get("compile.disable_autocast") else set()
    if values.get("attention.backend", "auto") != "auto" or values.get("attention.backend_config"):
        names.add("attention")
    if values.get("backend.float32_matmul", "auto") != "auto":
        names.add("float32_matmul")
    return names


def _collect(content: Mapping[str, Any], path: str | Path) -> FileValues:
    kinds = leaves()
    groups = {*(name.partition(".")[0] for name in kinds if "." in name), "experiment"}
    collected = FileValues()
    for key, value in content.items():
        key = str(key)
        if key in groups and isinstance(value, dict):
            _collect_group(key, value, collected, path)
        elif key in groups and isinstance(value, str) and key not in BY_KEY:
            collected.options[key] = value
        elif key == "config":
            raise UserError(f"{path}: a configuration file cannot name another with 'config'")
        elif key in BY_KEY:
            _set(collected, key, str(BY_KEY[key].path), value, path)
        elif key in kinds:
            _set(collected, key, key, value, path)
        elif key in groups:
            raise UserError(f"{path}: '{key}' takes the name of an option or a mapping of keys, not {value!r}")
        else:
            legal = [*BY_KEY, *groups, *kinds]
            raise UserError(f"{path}: unknown key '{key}'{nearest(key.replace('-', '_'), legal)}")
    return collected


def _collect_group(group: str, values: Mapping[str, Any], collected: FileValues, path: str | Path) -> None:
    kinds = leaves()
    for name, value in values.items():
        target = f"{group}.{name}"
        if target not in kinds:
            raise UserError(f"{path}: unknown key '{target}'{nearest(target, kinds)}")
        _set(collected, target, target, value, path)


def _set(collected: FileValues, key: str, target: str, value: Any, path: str | Path) -> None:
    if target in collected.values:
        raise UserError(f"{path} gives {target} twice (as '{key}' and in another form)")
    collected.values[target] = _typed(key, target, value, path)


def _typed(key: str, target: str, value: Any, path: str | Path) -> Any:
    try:
        return typed(target, value)
    except UserError:
        raise
    except InvalidValueError as error:
        shown = "null" if value is None else f"'{value}'"
        raise UserError(f"{path}: {key}: {shown} {error}") from None
