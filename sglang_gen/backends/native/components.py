"""Loads a model's components for the native engine: our networks, and components that other libraries load."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang_gen.backends import loading_report
from sglang_gen.backends.native.scheduler import build_scheduler
from sglang_gen.errors import UserError, first_line
from sglang_gen.families import autoencoder
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.hub import component_classes
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.hub.safetensors_header import header
from sglang_gen.hub.weight_files import locate
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.types import Component, Plan
from sglang_gen.weights import original_layout
from sglang_gen.weights.load import InMemoryTensors, Shrink, fill, load, where


def read_components(plan: Plan, pipeline: Pipeline, split: Split) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Load this rank's shards of the denoising networks, and the other components, by name, in the plan's dtype.

    The components are on the plan's device. A large text encoder that is loaded from a folder is
    sharded as well.

    Raises UserError for weights that do not fit, and the loading library's own exceptions for unreadable files.
    """
    spec, dtype = pipeline.spec, getattr(torch, plan.dtype)
    names = spec.networks_of(plan.card)
    networks = {name: _network(plan, name, pipeline, dtype, split.shrink) for name in names}
    others = [name for name in spec.required(plan.card) if name not in names]
    given = [name for name in others if plan.card.file is None or name in plan.run.model.component_paths]
    tp = split.mesh.axis("tp")
    components = {name: _component(name, plan.card.components[name], dtype, plan.device, tp) for name in given}
    if plan.card.file is not None:
        components = _components_from_file(plan, others, {**components, **dict.fromkeys(names)}, dtype)
    components["scheduler"] = _with_settings(components["scheduler"], spec.scheduler_settings)
    return networks, components


def _network(plan: Plan, name: str, pipeline: Pipeline, dtype: torch.dtype, shrink: Shrink) -> nn.Module:
    """Our network with the model's own weights, or with those of --transformer-weights-path."""
    component = plan.card.components[name]
    build = partial(pipeline.build, component.config)
    path = plan.run.quant.transformer_weights_path
    if path is None and plan.card.file is not None and name not in plan.run.model.component_paths:
        return _network_from_file(plan, plan.card.file, component, build, pipeline, dtype, shrink)
    if path is None:
        return load(build, in_folder(_folder(component)), pipeline.sources, dtype, plan.device, shrink)
    from sglang_gen.weights import replacement

    files = locate(path)
    if replacement.in_diffusers_layout(plan, name, files):
        return load(build, files.paths, pipeline.sources, dtype, plan.device, shrink)
    tensors = InMemoryTensors(original_layout.read(component.class_name, component.config, files.paths))
    return fill(build, tensors, pipeline.sources, dtype, plan.device, where(files.paths), shrink)


def _network_from_file(
    plan: Plan,
    file: Path,
    component: Component,
    build: Callable[[], nn.Module],
    pipeline: Pipeline,
    dtype: torch.dtype,
    shrink: Shrink,
) -> nn.Module:
    """Our network from a single-file checkpoint. Raises UserError if the checkpoint is of another model."""
    from sglang_gen.backends.diffusers.pipeline_loading import misfit

    try:
        tensors = InMemoryTensors(original_layout.read(component.class_name, component.config, [file]))
        return fill(build, tensors, pipeline.sources, dtype, plan.device, where([file]), shrink)
    except UserError as error:
        raise UserError(misfit(plan, str(error))) from error
    except original_layout.CONVERSION_ERRORS as error:
        raise UserError(misfit(plan, f"its {component.class_name} differs: {first_line(error)}")) from error


def _components_from_file(
    plan: Plan, names: Sequence[str], given: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The components `names` that diffusers' pipeline loads from the file or next to it; `given` ones are unchanged."""
    import diffusers

    from sglang_gen.backends.diffusers.pipeline_loading import read as read_pipeline

    pipeline_class = getattr(diffusers, plan.pipeline_class)
    own = {"vae": None} if "vae" in given else {}  # diffusers' pipeline cannot read the config of our autoencoder
    components = {**read_pipeline(plan, pipeline_class, dtype, {**given, **own}).components, **given}
    if "vae" not in given:
        tensors = InMemoryTensors(dict(components["vae"].state_dict()))
        build = partial(autoencoder.build, plan.card.components["vae"].config)
        components["vae"] = fill(build, tensors, autoencoder.sources, dtype, plan.device, str(plan.card.file))
    return {name: _to_device(components[name], plan.device) for name in names}


def _folder(component: Component) -> Path:
    assert component.folder is not None  # the plan's card was read from a folder with weights
    return component.folder


def _component(name: str, component: Component, dtype: torch.dtype, device: str, tp: Axis) -> Any:
    """Our autoencoder, this rank's shard of a large text encoder, or a component loaded by its own library."""
    if name == "scheduler":
        return build_scheduler(component)
    if name == "vae":
        return _autoencoder(component, dtype, device)
    if tp.size > 1:
        from sglang_gen.families import text_encoder_parallel

        if text_encoder_parallel.can_shard(component, dtype, tp):
            return text_encoder_parallel.read(_folder(component), dtype, device, tp)
    return _read(component, dtype, device)


def _autoencoder(component: Component, dtype: torch.dtype, device: str) -> nn.Module:
    """Our autoencoder with the weights from the component's folder."""
    files = in_folder(_folder(component))
    names = [name for file in files for name in header(file)]
    return load(partial(autoencoder.build, component.config), files, autoencoder.sources_in(names), dtype, device)


def _read(component: Component, dtype: torch.dtype, device: str) -> Any:
    """A text encoder, tokenizer or image processor, loaded by its own library."""
    folder = str(_folder(component))
    component_class = component_classes.named(component)
    if not issubclass(component_class, nn.Module):
        return component_class.from_pretrained(folder)
    if not loading_report.is_reported(component_class):
        return _to_device(component_class.from_pretrained(folder, dtype=dtype, use_safetensors=True), device)
    network = loading_report.read(component_class, _folder(component), component.config, dtype)
    return _to_device(network, device)


def _to_device(component: Any, device: str) -> Any:
    return component.to(device).requires_grad_(False).eval() if isinstance(component, nn.Module) else component


def _with_settings(scheduler: Any, settings: Mapping[str, Any]) -> Any:
    """The scheduler with these values, as diffusers' pipeline sets them; keys not in its config are ignored."""
    changes = {key: value for key, value in settings.items() if scheduler.config.get(key, value) != value}
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler
