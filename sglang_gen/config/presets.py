"""The model presets of conf/model, and how a model path or id selects one of them."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sglang_gen import env
from sglang_gen.config.values import parse_yaml
from sglang_gen.errors import UserError, nearest


@dataclass(frozen=True)
class Preset:
    name: str
    path: str | None
    description: str
    is_embedded: bool = False  # its weights are part of the package


def load(config_dir: str | None = None) -> list[Preset]:
    """All presets, sorted by name; those of `--config-dir` take precedence. Invalid files fail at composition."""
    presets: dict[str, Preset] = {}
    own = _load_folder(Path(config_dir)) if config_dir else ()
    for preset in (*own, *_shipped()):
        presets.setdefault(preset.name, preset)
    return sorted(presets.values(), key=lambda preset: preset.name)


@cache
def _shipped() -> tuple[Preset, ...]:
    return _load_folder(env.conf_dir())


def _load_folder(folder: Path) -> tuple[Preset, ...]:
    return tuple(_read(path) for path in sorted(folder.glob("model/*.yaml")))


def _read(path: Path) -> Preset:
    text, content = "", None
    with suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8")
        content = parse_yaml(text)
    model = content.get("model") if isinstance(content, dict) else None
    model = model if isinstance(model, dict) else {}
    hub_id = model.get("path") if isinstance(model.get("path"), str) else None
    comments = [line.lstrip("# ").rstrip() for line in text.splitlines() if re.match(r"# (?!@package)", line)]
    embedded = hub_id is None and model.get("preset") is not None
    return Preset(path.stem, hub_id, comments[0] if comments else "", embedded)


def by_path(path: str, known: list[Preset]) -> str | None:
    """The preset whose repository name equals the last part of a hub id or local path; None if no preset matches."""
    wanted = _normal(Path(path).name)
    names = [preset.name for preset in known if preset.path and _normal(Path(preset.path).name) == wanted]
    return names[0] if names else None


def by_id(name: str, known: list[Preset]) -> str | None:
    """The preset with this name, hub id or repository name, ignoring punctuation and case; None if none matches."""
    own = [preset.name for preset in known if _normal(preset.name) == _normal(name)]
    return own[0] if own else by_path(name, known)


def option(explicit: str | None, given: Mapping[str, Any], config_dir: str | None) -> str | None:
    """The option of the group `model` implied by a path or an id; None if an option is chosen or neither is given.

    `explicit` is the option chosen by name; `given` holds the user's values by config path.
    """
    known = load(config_dir)
    names = [preset.name for preset in known]
    name, path = given.get("model.id"), given.get("model.path")
    meant = by_id(str(name), known) if name is not None else None
    if name is not None and meant is None:
        raise UserError(f"No preset is named '{name}'{nearest(str(name), names)} (presets: {', '.join(names)})")
    if explicit is not None:
        if meant not in (None, explicit):
            raise UserError(f"model={explicit} and the model id '{name}' name two presets; give one")
        return None
    if meant is not None or path is None:
        return meant
    recorded = given.get("model.preset")  # a record names the preset that it was made with
    return recorded if recorded in names else by_path(str(path), known) or "custom"


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
