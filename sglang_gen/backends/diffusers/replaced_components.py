"""Loads the components of --component-paths, which replace those in the model's folder."""

from typing import Any

import torch

from sglang_gen.backends import component_file, loading_report
from sglang_gen.errors import LOADING_ERRORS, UserError, in_our_words
from sglang_gen.hub import component_classes
from sglang_gen.types import Plan


def load(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The components of --component-paths, on the CPU. Raises UserError naming one that cannot be loaded."""
    return {name: _load(plan, name, dtype) for name in plan.run.model.component_paths}


def _load(plan: Plan, name: str, dtype: torch.dtype) -> Any:
    component = plan.card.components[name]
    try:
        if component.file is not None:
            return component_file.load(component, dtype)
        kind = component_classes.named(component)
        if loading_report.is_reported(kind):
            assert component.folder is not None  # the plan's card was read from a folder with weights
            return loading_report.read(kind, component.folder, component.config, dtype)
        settings = {"dtype": dtype, "use_safetensors": True} if issubclass(kind, torch.nn.Module) else {}
        return kind.from_pretrained(str(component.folder), **settings)
    except UserError as error:
        raise UserError(f"--component-paths: {error}") from error
    except LOADING_ERRORS as error:
        path = plan.run.model.component_paths[name]
        raise UserError(f"--component-paths: '{name}' cannot be loaded from {path}: {in_our_words(error)}") from error
