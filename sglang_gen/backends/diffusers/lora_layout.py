"""Whose weights an adapter changes: its modules under the names of the pipeline's own.

diffusers knows the layouts (PEFT, kohya, xlabs, ai-toolkit and more) and renames, splits and regroups tensors, at times
dropping some without a word. So the file is converted twice: once as it is, and once with every tensor replaced by its
own number. Where the numbers arrive says which modules came through, and under which names.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sglang_gen.backends.diffusers.roles import denoisers, modules
from sglang_gen.types import TEXT_ENCODERS
from sglang_gen.weights.lora.file import DOWN, FACTOR, Factors
from sglang_gen.weights.lora.settings import PREFIX

PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of text encoders


@dataclass
class Target:
    """One weight of the pipeline and the two factors that are for it."""

    part: str
    name: str
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    sources: set[str] = field(default_factory=set)  # modules of the file


def targets(pipeline: Any, file: Mapping[str, Factors]) -> list[Target]:
    """The weights that the file's modules are for; `up` is scaled by alpha / rank.

    What has no place among them is in no `sources`. Raises what diffusers' conversion raises.
    """
    parts = denoisers(pipeline) | modules(pipeline, TEXT_ENCODERS)
    real: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for number, (module, factors) in enumerate(file.items(), start=1):
        owners[number] = module
        start = _full_name(module, parts)
        down, up = start + factors.down_key[len(module) :], start + factors.up_key[len(module) :]
        real |= {_plain(down): factors.down, _plain(up): factors.up * factors.scale}
        marked = torch.tensor(float(number))
        numbers |= {_plain(down): marked.expand(factors.down.shape), _plain(up): marked.expand(factors.up.shape)}
        # alpha / rank is in `up` already; some conversions insist on an alpha, for which the rank changes nothing
        if module.startswith("lora_unet_"):
            alpha = {f"{module}.alpha": torch.tensor(float(factors.down.shape[0]))}
            real, numbers = real | alpha, numbers | alpha
    found: dict[tuple[str, str], Target] = {}
    arrived = _convert(pipeline, numbers)
    for key, tensor in _convert(pipeline, real).items():
        if not (place := _place(key, parts)):
            continue
        part, name, is_down = place
        target = found.setdefault((part, name), Target(part, name))
        if is_down:
            target.down = tensor
        else:
            target.up = tensor
        target.sources |= {owners[number] for number in _numbers(arrived.get(key))}
    return [target for target in found.values() if target.down is not None and target.up is not None]


def _plain(key: str) -> str:
    return key.replace(".default.weight", ".weight")


def _full_name(module: str, parts: Mapping[str, nn.Module]) -> str:
    """PEFT's own files name the modules of one network, without saying which: the denoising one."""
    bare = module.removeprefix(PREFIX)
    for part, network in parts.items():
        if part not in TEXT_ENCODERS and _has(network, bare):
            return f"{part}.{bare}"
    return bare if bare.partition(".")[0] in parts else module


def _has(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


def _convert(pipeline: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in diffusers' own layout."""
    arguments: dict[str, Any] = {}
    if hasattr(pipeline, "unet"):
        arguments["unet_config"] = pipeline.unet.config  # tells the blocks of SDXL, whose authors number them through
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        arguments["return_alphas"] = True
    found = pipeline.lora_state_dict(dict(weights), **arguments)
    return dict(found[0] if isinstance(found, tuple) else found)


def _numbers(tensor: torch.Tensor | None) -> set[int]:
    """The numbers in a converted tensor: it may hold rows or columns of several, so a few of each are looked at."""
    if tensor is None:
        return set()
    flat = tensor.reshape(tensor.shape[0], -1)
    rows, columns = flat[:: max(1, flat.shape[0] // 64), 0], flat[0, :: max(1, flat.shape[1] // 64)]
    return {round(value) for value in torch.cat((rows, columns)).tolist()} - {0}


def _place(key: str, parts: Mapping[str, nn.Module]) -> tuple[str, str, bool] | None:
    """Part, module and side that a converted key is for; None where the pipeline has no such module."""
    found = FACTOR.match(key)
    if not found:
        return None
    part, _, name = found["module"].partition(".")
    if part not in parts:
        part, name = next(iter(parts)), found["module"]
    name = re.sub(r"\.(lora|lora_linear_layer)$", "", name.replace(".processor.", "."))
    if old := re.fullmatch(r"(.+)\.(to_q|to_k|to_v|to_out)_lora", name):
        is_text = part in TEXT_ENCODERS
        name = f"{old[1]}.{PROJECTIONS[old[2]] if is_text else old[2].replace('to_out', 'to_out.0')}"
    for spelled in (name, name.removeprefix("text_model."), f"text_model.{name}"):  # as transformers' versions have it
        if _has(parts[part], spelled) and hasattr(parts[part].get_submodule(spelled), "weight"):
            return part, spelled, found["side"] in DOWN
    return None
