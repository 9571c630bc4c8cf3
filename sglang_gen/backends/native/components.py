"""Loads the components of a model around its denoising network: our autoencoder, and what other libraries load."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang_gen.backends import component_file, loading_report, random_components
from sglang_gen.backends.native.scheduler import build_scheduler
from sglang_gen.config.schema import Weights
from sglang_gen.engine.memory_format import to_channels_last
from sglang_gen.families import autoencoder
from sglang_gen.families.contract import Spec
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.hub import component_classes
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.hub.safetensors_header import header
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.plan import offloading
from sglang_gen.types import Component, Plan
from sglang_gen.weights.load import InMemoryTensors, fill, load

RANDOM = "model.weights=random"  # in place of the name of a file


def read_components(plan: Plan, pipeline: Pipeline, mesh: Mesh) -> dict[str, Any]:
    """Load the components other than the denoising networks by name, in the plan's dtype and on its device.

    Of a large text encoder that is loaded from a folder this rank reads its shard.

    Raises UserError for weights that do not fit, and the loading library's own exceptions for unreadable files.
    """
    spec, dtype = pipeline.spec, getattr(torch, plan.dtype)
    networks = spec.networks_of(plan.card)
    others = [name for name in spec.required(plan.card) if name not in networks]
    given = [name for name in others if plan.card.file is None or name in plan.run.model.component_paths]
    tp = mesh.axis("tp")
    read = _random_component if plan.run.model.weights is Weights.random else _component
    components = {name: read(plan, name, dtype, loading_device(plan, spec, name), tp) for name in given}
    if plan.card.file is not None:
        others_given = {**components, **dict.fromkeys(networks)}
        components = _components_from_file(plan, spec, others, others_given, dtype)
    format_autoencoder(components["vae"], pipeline, dtype, plan.device)
    components["scheduler"] = _with_settings(components["scheduler"], spec.scheduler_settings)
    return components


def format_autoencoder(vae: Any, pipeline: Pipeline, dtype: torch.dtype, device: str) -> None:
    """Convert an autoencoder that decodes in half precision on a GPU to channels_last, as tensor cores take it."""
    if device == "cuda" and pipeline.decoding_dtype(vae.config, dtype).itemsize == 2:
        to_channels_last(vae)


def offloaded_names(plan: Plan, spec: Spec) -> set[str]:
    """The components, other than the denoising networks, whose weights are on the host while they are not used."""
    options = offloading.active(plan.run, plan.device)
    text = spec.text_encoders if "text_encoder_cpu_offload" in options else ()
    return {*text, *(("vae",) if "vae_cpu_offload" in options else ())}


def loading_device(plan: Plan, spec: Spec, name: str) -> str:
    return "cpu" if name in offloaded_names(plan, spec) else plan.device


def _components_from_file(
    plan: Plan, spec: Spec, names: Sequence[str], given: dict[str, Any], dtype: torch.dtype
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
        components["vae"] = fill(
            build, tensors, autoencoder.sources, dtype, loading_device(plan, spec, "vae"), str(plan.card.file)
        )
    return {name: _to_device(components[name], loading_device(plan, spec, name)) for name in names}


def _folder(component: Component) -> Path:
    assert component.folder is not None  # the plan's card was read from a folder with weights
    return component.folder


def _component(plan: Plan, name: str, dtype: torch.dtype, device: str, tp: Axis) -> Any:
    """Our autoencoder, this rank's shard of a large text encoder, or a component loaded by its own library."""
    component = plan.card.components[name]
    if name == "scheduler":
        return build_scheduler(component)
    if name == "vae":
        return _autoencoder(component, dtype, device)
    if tp.size > 1:
        from sglang_gen.families import text_encoder_parallel

        if text_encoder_parallel.can_shard(component, dtype, tp):
            return text_encoder_parallel.read(_folder(component), dtype, device, tp)
    return _read(component, dtype, device)


def _random_component(plan: Plan, name: str, dtype: torch.dtype, device: str, tp: Axis) -> Any:
    """The same with random weights."""
    component = plan.card.components[name]
    if name == "scheduler":
        return build_scheduler(component)
    if name == "vae":
        weights = random_components.tensors(name, component, dtype)
        build = partial(autoencoder.build, component.config)
        return fill(build, weights, autoencoder.sources, dtype, device, RANDOM)
    if tp.size > 1:
        from sglang_gen.families import text_encoder_parallel

        if text_encoder_parallel.can_shard(component, dtype, tp):
            weights = random_components.tensors(name, component, dtype)
            return text_encoder_parallel.from_tensors(component, weights, (dtype, device), RANDOM, tp)
    return random_components.build_component(plan, name, dtype, device)


def _autoencoder(component: Component, dtype: torch.dtype, device: str) -> nn.Module:
    """Our autoencoder with the weights from the component's folder, or from its file."""
    if component.file is not None:
        weights = InMemoryTensors(component_file.tensors(component))
        build = partial(autoencoder.build, component.config)
        return fill(build, weights, autoencoder.sources, dtype, device, str(component.file))
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
