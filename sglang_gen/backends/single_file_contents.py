"""Every tensor of a whole model in one file accounted for, by names and shapes, before a weight is read.

diffusers converts a file component by component. It reports neither the tensors that a component lacks nor those that
no component takes. So the file is converted once with every tensor replaced by its own number, which needs no memory:
where the numbers arrive says which tensors came through, and under which names.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from sglang_gen import log
from sglang_gen.backends.diffusers.pipeline_loading import misfit
from sglang_gen.backends.loading_report import require_complete, warn_unused
from sglang_gen.errors import UserError
from sglang_gen.hub import component_classes, single_file
from sglang_gen.hub.safetensors_header import header
from sglang_gen.hub.weight_files import few
from sglang_gen.plan.quantization import denoisers
from sglang_gen.types import Component, Plan
from sglang_gen.weights.original_layout import CONVERSION_ERRORS, conversion

SAMPLES = 64  # numbers of each dimension of a converted tensor that are looked at


def check(plan: Plan) -> None:
    """Compare the file of a plan's model with its components, and warn of tensors that nothing takes.

    Raises UserError for a network or an autoencoder that lacks tensors, or has them in another shape.
    """
    file, backend = plan.card.file, plan.backend
    if file is None:
        return
    shapes = header(file)
    replaced = {*plan.run.model.component_paths}
    networks = () if backend == "sglang" or plan.run.quant.transformer_weights_path else denoisers(plan.card)
    for name in (*networks, "vae"):  # the native engine compares its network itself
        component = plan.card.components.get(name)
        if component is not None and name not in replaced:
            try:
                _check_component(file, name, component, shapes)
            except UserError as error:
                raise UserError(misfit(plan, str(error))) from error
    for name in single_file.CLIP_PREFIXES.keys() | {"text_encoder_3"}:
        component = plan.card.components.get(name)
        if component is not None and name not in replaced:
            _check_text_encoder(file, name, component, shapes)
    left = single_file.unclaimed(shapes, plan.card.components)
    if left:
        log.warn_once(
            f"{file} holds {len(left)} tensors of no component of {plan.pipeline_class} ({few(left)}); they are left "
            "out, and the result can differ from the one that the file was made for"
        )


def _check_component(file: Path, name: str, component: Component, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where the file does not hold the whole component; warns of tensors that it has no place for."""
    kind = component_classes.named(component)
    convert = conversion([base.__name__ for base in kind.__mro__])
    if convert is None:  # diffusers says that it does not read this class from a file
        return
    names = list(shapes)
    numbered = {key: torch.tensor(float(index)).expand(shapes[key]) for index, key in enumerate(names)}
    try:
        converted = convert(component.config, numbered)
    except CONVERSION_ERRORS:  # the loader fails in the same way, and its failure is explained there
        return
    found = {key: tensor for key, tensor in converted.items() if isinstance(tensor, Tensor)}
    expected = _expected(kind, component)
    other = [
        f"{key} has the shape {list(found[key].shape)} in place of {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in found and tuple(found[key].shape) != shape
    ]
    require_complete(sorted(expected.keys() - found.keys()), other, kind.__name__, file.name)
    arrived = {number for key in expected for number in _numbers(found[key])}
    mine = single_file.of_component(names, name)
    warn_unused(
        (key for number, key in enumerate(names) if key in mine and number not in arrived), kind.__name__, str(file)
    )


def _check_text_encoder(file: Path, name: str, component: Component, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Warn of tensors that a text encoder in transformers' layout has no place for; its loader finds missing ones."""
    mine = single_file.of_text_encoder(shapes, name, component)
    kind = component_classes.named(component)
    if not mine or component.folder is None or not hasattr(kind, "config_class"):
        return
    with init_empty_weights():
        encoder = kind(kind.config_class.from_pretrained(component.folder))
    expected = {key.removeprefix("text_model.") for key in encoder.state_dict()}
    warn_unused((mine[key] for key in mine if key not in expected), kind.__name__, str(file))


def _expected(kind: Any, component: Component) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a network of this class and configuration."""
    with init_empty_weights():
        network = kind.from_config(dict(component.config))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _numbers(tensor: Tensor) -> Collection[int]:
    """The numbers in a converted tensor: it may be joined of several along its first or second dimension."""
    if tensor.numel() == 0:
        return set()
    flat = tensor.reshape(1) if tensor.dim() == 0 else tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    flat = flat.reshape(len(flat), -1)
    rows, columns = flat[:: max(1, len(flat) // SAMPLES), 0], flat[0, :: max(1, flat.shape[1] // SAMPLES)]
    return {round(value) for value in torch.cat((rows, columns)).tolist()}
