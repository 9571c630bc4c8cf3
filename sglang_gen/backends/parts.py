"""A model's components for the native engine: our network, and the parts that other libraries read."""

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang_gen.errors import UserError
from sglang_gen.requirements import Needs
from sglang_gen.types import Component, Plan
from sglang_gen.weight_files import locate
from sglang_gen.weights import original
from sglang_gen.weights.load import Held, fill, load, weight_files, where


def read(plan: Plan, needs: Needs, glue: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The denoising network and all other components by name, in the plan's dtype and on its device.

    Raises UserError for weights that do not fit, and whatever their libraries raise for files that cannot be read.
    """
    dtype = getattr(torch, plan.dtype)
    network = _network(plan, needs.network, glue, dtype)
    parts = {
        name: _read(plan.card.components[name], dtype, plan.device)
        for name in needs.components
        if name != needs.network
    }
    parts["scheduler"] = _settled(parts["scheduler"], glue.SCHEDULER)
    return network, parts


def _network(plan: Plan, name: str, glue: Any, dtype: torch.dtype) -> nn.Module:
    """Our network with the model's own weights, or those of --transformer-weights-path."""
    component = plan.card.components[name]
    build = partial(glue.build, component.config)
    path = plan.run.quant.transformer_weights_path
    if path is None:
        return load(build, weight_files(_folder(component)), glue.sources, dtype, plan.device)
    from sglang_gen.backends.options import weights

    files = locate(path)
    if weights.plain(plan, name, files):
        return load(build, files.paths, glue.sources, dtype, plan.device)
    tensors = Held(original.read(component.class_name, component.config, files.paths))
    return fill(build, tensors, glue.sources, dtype, plan.device, where(files.paths))


def _folder(component: Component) -> Path:
    assert component.folder is not None  # the plan's card was read from a folder with weights
    return component.folder


def _read(component: Component, dtype: torch.dtype, device: str) -> Any:
    """A text encoder, tokenizer, autoencoder or scheduler, as its own library reads it."""
    kind = getattr(importlib.import_module(component.library), component.class_name)
    folder = str(_folder(component))
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(folder)
    part, told = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"{folder} is no checkpoint of a {component.class_name}: it lacks {len(missing)} of its tensors, such as "
            f"{missing[0]}"
        )
    return part.to(device).requires_grad_(False).eval()


def _settled(scheduler: Any, settings: Mapping[str, Any]) -> Any:
    """The scheduler with those of the settings that it has; a value that differs is set as diffusers' pipeline does."""
    other = {key: value for key, value in settings.items() if scheduler.config.get(key, value) != value}
    return type(scheduler).from_config(scheduler.config, **other) if other else scheduler
