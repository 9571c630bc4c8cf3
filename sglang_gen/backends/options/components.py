"""Components that replace those of the model's own folder."""

import importlib
from pathlib import Path
from typing import Any

import torch

from sglang_gen.errors import UserError, first_line, nearest
from sglang_gen.types import Component, Plan

LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


def load(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """What --component-paths names: each a component folder, or a model folder or hub id that has the component.

    Raises UserError naming the component that is unknown or cannot be loaded.
    """
    return {name: _load(plan, name, path, dtype) for name, path in plan.run.model.component_paths.items()}


def _load(plan: Plan, name: str, path: str, dtype: torch.dtype) -> Any:
    known = plan.card.components
    if name not in known:
        raise UserError(f"--component-paths: {plan.card.name} has no component '{name}'{nearest(name, known)}")
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") != 1):
        raise UserError(f"--component-paths: the folder {path} of '{name}' does not exist")
    inside = not folder.is_dir() or (folder / name).is_dir()
    if f"{name}/{known[name].library}.py" in plan.card.code:
        raise UserError(f"--component-paths: '{name}' is defined by the model's own code and cannot be replaced")
    kind = component_class(known[name])
    arguments: dict[str, Any] = {"subfolder": name} if inside else {}
    if issubclass(kind, torch.nn.Module):
        arguments |= {"dtype": dtype, "use_safetensors": True}
    try:
        return kind.from_pretrained(str(folder) if folder.is_dir() else path, **arguments)
    except LOADING_ERRORS as error:
        raise UserError(f"--component-paths: '{name}' cannot be loaded from {path}: {first_line(error)}") from error


def component_class(component: Component) -> Any:
    """The class that model_index.json names."""
    return getattr(importlib.import_module(component.library), component.class_name)
