"""Reading `--config FILE`: flag names with underscores, nested group keys, or the record of an earlier run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError, nearest
from sglang_gen.flags import BY_KEY, FILE_OR_INLINE
from sglang_gen.schema import SCHEMA_VERSION, coerce, leaves

# What a record pins: the choice that the run made where the request left it open.
PINNED = {"backend": "backend.name", "dtype": "dtype", "device": "device", "seed": "sampling.seed"}


@dataclass(frozen=True)
class FileValues:
    """What a configuration file says: typed values by config path, and options chosen for whole groups."""

    values: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)  # of the run that a record describes


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a .json, .yaml or .yml file. Raises UserError with one sentence when there is none."""
    path = Path(path)
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise UserError(f"{path} is not a .json, .yaml or .yml file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"The file {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"The file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"The file {path} cannot be read: {error.strerror}") from None
    content = _parse(text, path)
    if not isinstance(content, dict):
        raise UserError(f"The file {path} holds no mapping of keys to values")
    return content


def _parse(text: str, path: Path) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}") from None
        except RecursionError:
            raise UserError(f"{path} is nested too deeply") from None
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}{where}") from None


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} gives the key '{twice}' twice")
    return found


def read_config_file(path: str | Path) -> FileValues:
    """Values and group options of a configuration file. Raises UserError; unknown keys name the nearest legal one."""
    content = read_mapping(path)
    if "schema_version" in content:
        return _read_record(content, path)
    return _collect(content, path)


def _read_record(record: Mapping[str, Any], path: str | Path) -> FileValues:
    version = record["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(f"{path} is a record of schema version {version}; this sglang-gen reads up to {SCHEMA_VERSION}")
    if not isinstance(record.get("run"), dict):
        raise UserError(f"{path} has a schema_version but no 'run': it is not the record of a run")
    found = _collect(record["run"], path)
    kinds, effective = leaves(), record.get("effective") or {}
    for name, target in PINNED.items():
        if effective.get(name) is not None:
            found.values[target] = _typed(f"effective.{name}", target, effective[name], kinds, path)
    return FileValues(found.values, found.options, dict(record.get("versions") or {}))


def _collect(content: Mapping[str, Any], path: str | Path) -> FileValues:
    kinds = leaves()
    groups = {name.partition(".")[0] for name in kinds if "." in name}
    found = FileValues()
    for key, value in content.items():
        key = str(key)
        if key in groups and isinstance(value, dict):
            _collect_group(key, value, kinds, found, path)
        elif key in groups and isinstance(value, str) and key not in BY_KEY:
            found.options[key] = value
        elif key == "config":
            raise UserError(f"{path}: a configuration file cannot name another with 'config'")
        elif key in BY_KEY:
            _set(found, key, str(BY_KEY[key].path), value, kinds, path)
        elif key in kinds:
            _set(found, key, key, value, kinds, path)
        else:
            legal = [*BY_KEY, *groups, *kinds]
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, legal)}")
    return found


def _collect_group(
    group: str, values: Mapping[str, Any], kinds: dict[str, Any], found: FileValues, path: str | Path
) -> None:
    for name, value in values.items():
        target = f"{group}.{name}"
        if target not in kinds:
            raise UserError(f"{path}: unknown key '{target}'{nearest(target, kinds)}")
        _set(found, target, target, value, kinds, path)


def _set(found: FileValues, key: str, target: str, value: Any, kinds: dict[str, Any], path: str | Path) -> None:
    if target in found.values:
        raise UserError(f"{path} gives {target} twice (as '{key}' and in another form)")
    found.values[target] = _typed(key, target, value, kinds, path)


def _typed(key: str, target: str, value: Any, kinds: dict[str, Any], path: str | Path) -> Any:
    try:
        if target in FILE_OR_INLINE and isinstance(value, str) and not value.lstrip().startswith("{"):
            return coerce(read_mapping(value), kinds[target])
        return coerce(value, kinds[target])
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {key}: '{value}' {error}") from None
