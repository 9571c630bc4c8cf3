"""Checks the tensors of a single-file checkpoint, by names and shapes, before weights are read.

diffusers converts a file component by component. It reports neither missing tensors nor tensors that no component uses.
So the file is converted once with every tensor filled with its index (expanded, which needs no memory): the indices in
the result show which tensors were converted, and to which names.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from sglang_gen import log
from sglang_gen.backends.diffusers.pipeline_loading import misfit
from sglang_gen.backends.loading_report import WITHOUT_EFFECT, require_complete, warn_unused
from sglang_gen.errors import UserError
from sglang_gen.hub import component_classes, single_file
from sglang_gen.hub.safetensors_header import header
from sglang_gen.hub.weight_files import few
from sglang_gen.plan.quantization import denoisers
from sglang_gen.types import TEXT_ENCODERS, Component, Plan
from sglang_gen.weights.original_layout import CONVERSION_ERRORS, conversion

SHARED_NAMES = ("shared.weight", "encoder.embed_tokens.weight")  # names of a T5 encoder's embedding table
SAMPLES = 64  # entries along each dimension of a converted tensor that are inspected


def check_single_file(plan: Plan) -> None:
    """Compare the single file of a plan's model with its components, and warn of tensors that no component uses.

    Raises UserError if tensors of a network or an autoencoder are missing or have another shape.
    """
    file, backend = plan.card.file, plan.backend
    if file is None:
        return
    shapes = header(file)
    replaced = {*plan.run.model.component_paths}
    networks = () if backend == "sglang" or plan.run.quant.transformer_weights_path else denoisers(plan.card)
    for name in (*networks, "vae"):  # the native engine checks its network when it loads it
        component = plan.card.components.get(name)
        if component is not None and name not in replaced:
            try:
                _check_component(file, name, component, shapes)
            except UserError as error:
                raise UserError(misfit(plan, str(error))) from error
    for name in TEXT_ENCODERS:
        component = plan.card.components.get(name)
        if component is not None and name not in replaced:
            try:
                _check_text_encoder(file, name, component, shapes)
            except UserError as error:
                raise UserError(misfit(plan, str(error))) from error
    left = single_file.unclaimed(shapes, plan.card.components)
    if left:
        log.warn_once(
            f"{file} holds {len(left)} tensors that belong to no component of {plan.pipeline_class} ({few(left)}); "
            "they are left out, and the result can differ from the one that the file was made for"
        )


def _check_component(file: Path, name: str, component: Component, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if the file does not hold the whole component; warns of tensors that the component ignores."""
    kind = component_classes.named(component)
    convert = conversion([base.__name__ for base in kind.__mro__])
    if convert is None:  # loading reports that diffusers cannot read this class from a single file
        return
    names = list(shapes)
    numbered = {key: torch.tensor(float(index)).expand(shapes[key]) for index, key in enumerate(names)}
    try:
        converted = convert(component.config, numbered)
    except CONVERSION_ERRORS:  # loading fails in the same way and explains the error
        return
    tensors = {key: tensor for key, tensor in converted.items() if isinstance(tensor, Tensor)}
    expected = _expected(kind, component)
    mismatched = [
        f"{key} has the shape {list(tensors[key].shape)} in place of {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    require_complete(sorted(expected.keys() - tensors.keys()), mismatched, kind.__name__, file.name)
    used = {number for key in expected for number in _numbers(tensors[key])}
    mine = single_file.of_component(names, name)
    warn_unused(
        (key for number, key in enumerate(names) if key in mine and number not in used), kind.__name__, str(file)
    )


def _check_text_encoder(file: Path, name: str, component: Component, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if a text encoder in transformers' layout is incomplete; warns of tensors that it ignores.

    A text projection may be absent, and one of two tensors that modules share.
    """
    mine = single_file.of_text_encoder(shapes, name, component)
    kind = component_classes.named(component)
    if not mine or component.folder is None or not hasattr(kind, "config_class"):
        return
    with init_empty_weights():
        encoder = kind(kind.config_class.from_pretrained(component.folder))
    expected = {key.removeprefix("text_model."): tuple(each.shape) for key, each in encoder.state_dict().items()}
    for one, other in (SHARED_NAMES, SHARED_NAMES[::-1]):
        if one not in mine and other in mine:
            expected.pop(one, None)
    missing = sorted(key for key in expected.keys() - mine.keys() if not WITHOUT_EFFECT.search(key))
    mismatched = [
        f"{mine[key]} has the shape {list(shapes[mine[key]])} in place of {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in mine and shapes[mine[key]] != shape
    ]
    require_complete(missing, mismatched, kind.__name__, file.name)
    warn_unused((mine[key] for key in mine if key not in expected), kind.__name__, str(file))


def _expected(kind: Any, component: Component) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a network of this class and configuration."""
    with init_empty_weights():
        network = kind.from_config(dict(component.config))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _numbers(tensor: Tensor) -> Collection[int]:
    """The indices in a converted tensor, which may be a concatenation along its first or second dimension."""
    if tensor.numel() == 0:
        return set()
    flat = tensor.reshape(1) if tensor.dim() == 0 else tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    flat = flat.reshape(len(flat), -1)
    rows, columns = flat[:: max(1, len(flat) // SAMPLES), 0], flat[0, :: max(1, flat.shape[1] // SAMPLES)]
    return {round(value) for value in torch.cat((rows, columns)).tolist()}
