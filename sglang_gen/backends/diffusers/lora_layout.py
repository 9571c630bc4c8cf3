"""Maps the modules of a LoRA file to the modules of a pipeline.

diffusers converts the layouts (PEFT, kohya, xlabs, ai-toolkit and more): it renames, splits and regroups tensors, and
silently drops some. So the file is converted twice: once unchanged, and once with every tensor filled with its index.
The indices in the result show which modules were converted, and to which names.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sglang_gen.backends.diffusers.roles import denoisers, modules
from sglang_gen.types import DENOISERS, TEXT_ENCODERS
from sglang_gen.weights.lora.file import DOWN, FACTOR, Factors
from sglang_gen.weights.lora.settings import PREFIX

PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of text encoders

# Raised by diffusers' conversions for a module that they do not know, and for a malformed file.
LORA_ERRORS = (
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
)


@dataclass
class Target:
    """One weight of the pipeline and its two LoRA factors."""

    component: str
    name: str
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    sources: set[str] = field(default_factory=set)  # modules of the file


def targets(pipeline: Any, file: Mapping[str, Factors]) -> list[Target]:
    """The pipeline's weights that the file's modules change; `up` is scaled by alpha / rank.

    A module without a matching weight is in no target's `sources`, nor is one that diffusers refuses to convert. Raises
    the exceptions of its conversion if they are not due to single modules.
    """
    try:
        return _targets(pipeline, file)
    except LORA_ERRORS:
        known = {module: factors for module, factors in file.items() if _is_known(pipeline, module, factors)}
        if len(known) == len(file):
            raise
    return _targets(pipeline, known) if known else []


def _is_known(pipeline: Any, module: str, factors: Factors) -> bool:
    """Whether diffusers converts the module without an error if it is the only one of its file."""
    try:
        _targets(pipeline, {module: factors})
    except LORA_ERRORS:
        return False
    return True


def _targets(pipeline: Any, file: Mapping[str, Factors]) -> list[Target]:
    components = denoisers(pipeline) | modules(pipeline, TEXT_ENCODERS)
    real: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for number, (module, factors) in enumerate(file.items(), start=1):
        owners[number] = module
        start = _full_name(module, components)
        down, up = start + factors.down_key[len(module) :], start + factors.up_key[len(module) :]
        real |= {_plain(down): factors.down, _plain(up): factors.up * factors.scale}
        marked = torch.tensor(float(number))
        numbers |= {_plain(down): marked.expand(factors.down.shape), _plain(up): marked.expand(factors.up.shape)}
        # `up` is already scaled by alpha / rank; some conversions require an alpha, and alpha = rank scales by 1
        if module.startswith(f"lora_{DENOISERS[-1]}_"):  # kohya's prefix for every denoising network
            alpha = {f"{module}.alpha": torch.tensor(float(factors.down.shape[0]))}
            real, numbers = real | alpha, numbers | alpha
    matched: dict[tuple[str, str], Target] = {}
    converted_numbers = _convert(pipeline, numbers)
    for key, tensor in _convert(pipeline, real).items():
        if not (place := _place(key, components)):
            continue
        component, name, is_down = place
        target = matched.setdefault((component, name), Target(component, name))
        if is_down:
            target.down = tensor
        else:
            target.up = tensor
        target.sources |= {owners[number] for number in _numbers(converted_numbers.get(key))}
    return [target for target in matched.values() if target.down is not None and target.up is not None]


def _plain(key: str) -> str:
    return key.replace(".default.weight", ".weight")


def _full_name(module: str, components: Mapping[str, nn.Module]) -> str:
    """Prefix a module of a PEFT file with its component: such files name modules of the denoising network alone."""
    bare = module.removeprefix(PREFIX)
    for component, network in components.items():
        if component not in TEXT_ENCODERS and _has(network, bare):
            return f"{component}.{bare}"
    return bare if bare.partition(".")[0] in components else module


def _has(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


def _convert(pipeline: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in diffusers' own layout."""
    arguments: dict[str, Any] = {}
    network = getattr(pipeline, DENOISERS[-1], None)
    if network is not None:  # to map blocks that their authors number consecutively
        arguments[f"{DENOISERS[-1]}_config"] = network.config
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        arguments["return_alphas"] = True
    converted = pipeline.lora_state_dict(dict(weights), **arguments)
    return dict(converted[0] if isinstance(converted, tuple) else converted)


def _numbers(tensor: torch.Tensor | None) -> set[int]:
    """The module numbers in a converted tensor; sampled along both dimensions, since it may be a concatenation."""
    if tensor is None:
        return set()
    flat = tensor.reshape(tensor.shape[0], -1)
    rows, columns = flat[:: max(1, flat.shape[0] // 64), 0], flat[0, :: max(1, flat.shape[1] // 64)]
    return {round(value) for value in torch.cat((rows, columns)).tolist()} - {0}


def _place(key: str, components: Mapping[str, nn.Module]) -> tuple[str, str, bool] | None:
    """Component, module and whether it is the down factor, for a converted key; None if there is no such module."""
    factor = FACTOR.match(key)
    if not factor:
        return None
    component, _, name = factor["module"].partition(".")
    if component not in components:
        component, name = next(iter(components)), factor["module"]
    name = re.sub(r"\.(lora|lora_linear_layer)$", "", name.replace(".processor.", "."))
    if old := re.fullmatch(r"(.+)\.(to_q|to_k|to_v|to_out)_lora", name):
        is_text = component in TEXT_ENCODERS
        name = f"{old[1]}.{PROJECTIONS[old[2]] if is_text else old[2].replace('to_out', 'to_out.0')}"
    for spelled in (
        name,
        name.removeprefix("text_model."),
        f"text_model.{name}",
    ):  # depends on the version of transformers
        if _has(components[component], spelled) and hasattr(components[component].get_submodule(spelled), "weight"):
            return component, spelled, factor["side"] in DOWN
    return None
