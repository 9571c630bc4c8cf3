"""An autoencoder of --component-paths in one file, in diffusers' layout or in the original one."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor

from sglang_gen.backends.loading_report import require_complete, shape_clause, warn_unused
from sglang_gen.errors import UserError
from sglang_gen.hub import component_classes
from sglang_gen.hub.safetensors_header import header
from sglang_gen.types import Component, Plan
from sglang_gen.weights.original_layout import CONVERSION_ERRORS, conversion

# Names of an autoencoder's attention before diffusers 0.15.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OWN_LAYOUT = ("decoder.up_blocks.", "decoder.mid_block.")


def check_component_files(plan: Plan) -> None:
    """Compare the files of --component-paths with their components by headers. Raises UserError."""
    for component in plan.card.components.values():
        if component.file is not None:
            _check(component)


def _check(component: Component) -> None:
    meta = {name: torch.empty(shape, device="meta") for name, shape in header(_file(component)).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in _network(component).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in _named(component, meta).items()}
    shapes = [
        shape_clause(name, given[name], shape)
        for name, shape in sorted(expected.items())
        if given.get(name, shape) != shape
    ]
    where = f"--component-paths: {component.file}"
    require_complete(sorted(expected.keys() - given.keys()), shapes, component.class_name, where)
    warn_unused(given.keys() - expected.keys(), component.class_name, str(component.file))


def tensors(component: Component) -> dict[str, Tensor]:
    """The weights of a component's file under diffusers' names."""
    return _named(component, load_file(_file(component)))


def load(component: Component, dtype: torch.dtype) -> Any:
    """diffusers' network with the weights of its file, on the CPU."""
    network, found = _network(component), tensors(component)
    network.load_state_dict({name: found[name].to(dtype) for name in network.state_dict()}, assign=True)
    return network.eval()


def _file(component: Component) -> Any:
    assert component.file is not None
    return component.file


def _network(component: Component) -> Any:
    with init_empty_weights():
        return component_classes.named(component).from_config(dict(component.config))


def _named(component: Component, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names. Raises UserError for a file in neither layout."""
    if any(name.startswith(OWN_LAYOUT) for name in given):
        return {_new(name): tensor for name, tensor in given.items()}
    convert = conversion([component.class_name])
    try:
        found: Mapping[str, Tensor] = convert(dict(component.config), dict(given)) if convert else {}
    except CONVERSION_ERRORS:
        found = {}
    if not found:
        raise UserError(
            f"--component-paths: {component.file} is neither in diffusers' layout of {component.class_name} nor in the "
            "original one"
        )
    return dict(found)


def _new(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name
