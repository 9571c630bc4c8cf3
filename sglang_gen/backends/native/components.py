"""A model's components for the native engine: our networks, and the parts that other libraries read."""

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
from sglang_gen.hub import component_classes
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.hub.safetensors_header import header
from sglang_gen.hub.weight_files import locate
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.plan.supported_configs import Needs
from sglang_gen.types import Component, Plan
from sglang_gen.weights import original_layout
from sglang_gen.weights.load import InMemoryTensors, Shrink, fill, load, where


def read(plan: Plan, needs: Needs, glue: Any, split: Split) -> tuple[nn.Module, dict[str, Any]]:
    """This rank's part of the denoising network and all other components by name, in the plan's dtype, on its device.

    Of a T5 in a folder each rank of a tensor parallel group has its part too.

    Raises UserError for weights that do not fit, and whatever their libraries raise for files that cannot be read.
    """
    dtype = getattr(torch, plan.dtype)
    network = _network(plan, needs.network, glue, dtype, split.shrink)
    others = [name for name in needs.required(plan.card) if name != needs.network]
    given = [name for name in others if plan.card.file is None or name in plan.run.model.component_paths]
    tp = split.mesh.axis("tp")
    parts = {name: _part(name, plan.card.components[name], dtype, plan.device, tp) for name in given}
    if plan.card.file is not None:
        parts = _out_of_file(plan, others, {**parts, needs.network: None}, dtype)
    parts["scheduler"] = _settled(parts["scheduler"], glue.SCHEDULER)
    return network, parts


def _network(plan: Plan, name: str, glue: Any, dtype: torch.dtype, shrink: Shrink) -> nn.Module:
    """Our network with the model's own weights, or those of --transformer-weights-path."""
    component = plan.card.components[name]
    build = partial(glue.build, component.config)
    path = plan.run.quant.transformer_weights_path
    if path is None and plan.card.file is not None and name not in plan.run.model.component_paths:
        return _network_out_of_file(plan, plan.card.file, component, build, glue, dtype, shrink)
    if path is None:
        return load(build, in_folder(_folder(component)), glue.sources, dtype, plan.device, shrink)
    from sglang_gen.weights import replacement

    files = locate(path)
    if replacement.in_diffusers_layout(plan, name, files):
        return load(build, files.paths, glue.sources, dtype, plan.device, shrink)
    tensors = InMemoryTensors(original_layout.read(component.class_name, component.config, files.paths))
    return fill(build, tensors, glue.sources, dtype, plan.device, where(files.paths), shrink)


def _network_out_of_file(
    plan: Plan,
    file: Path,
    component: Component,
    build: Callable[[], nn.Module],
    glue: Any,
    dtype: torch.dtype,
    shrink: Shrink,
) -> nn.Module:
    """Our network out of a checkpoint of the whole model. Raises UserError for one of another model."""
    from sglang_gen.backends.diffusers.pipeline_loading import misfit

    try:
        tensors = InMemoryTensors(original_layout.read(component.class_name, component.config, [file]))
        return fill(build, tensors, glue.sources, dtype, plan.device, where([file]), shrink)
    except UserError as error:
        raise UserError(misfit(plan, str(error))) from error
    except original_layout.CONVERSION_ERRORS as error:
        raise UserError(misfit(plan, f"its {component.class_name} is another one: {first_line(error)}")) from error


def _out_of_file(plan: Plan, names: Sequence[str], given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The components of these names that diffusers' pipeline finds in the file, or beside it; `given` as they are."""
    import diffusers

    from sglang_gen.backends.diffusers.pipeline_loading import read as read_pipeline

    kind = getattr(diffusers, plan.pipeline_class)
    own = {"vae": None} if "vae" in given else {}  # ours is none that diffusers' pipeline could look into
    found = {**read_pipeline(plan, kind, dtype, {**given, **own}).components, **given}
    if "vae" not in given:
        tensors = InMemoryTensors(dict(found["vae"].state_dict()))
        build = partial(autoencoder.build, plan.card.components["vae"].config)
        found["vae"] = fill(build, tensors, autoencoder.sources, dtype, plan.device, str(plan.card.file))
    return {name: _placed(found[name], plan.device) for name in names}


def _folder(component: Component) -> Path:
    assert component.folder is not None  # the plan's card was read from a folder with weights
    return component.folder


def _part(name: str, component: Component, dtype: torch.dtype, device: str, tp: Axis) -> Any:
    """The autoencoder is ours, a large text encoder this rank's part; any other is read by its own library."""
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
    """Our autoencoder with the weights of the component's folder."""
    files = in_folder(_folder(component))
    names = [name for file in files for name in header(file)]
    return load(partial(autoencoder.build, component.config), files, autoencoder.sources_in(names), dtype, device)


def _read(component: Component, dtype: torch.dtype, device: str) -> Any:
    """A text encoder, tokenizer or scheduler, as its own library reads it."""
    folder = str(_folder(component))
    kind = component_classes.named(component)
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(folder)
    if not loading_report.is_reported(kind):
        return _placed(kind.from_pretrained(folder, dtype=dtype, use_safetensors=True), device)
    part = loading_report.read(kind, _folder(component), component.config, dtype)
    return _placed(part, device)


def _placed(part: Any, device: str) -> Any:
    return part.to(device).requires_grad_(False).eval() if isinstance(part, nn.Module) else part


def _settled(scheduler: Any, settings: Mapping[str, Any]) -> Any:
    """The scheduler with those of the settings that it has; a value that differs is set as diffusers' pipeline does."""
    other = {key: value for key, value in settings.items() if scheduler.config.get(key, value) != value}
    return type(scheduler).from_config(scheduler.config, **other) if other else scheduler
