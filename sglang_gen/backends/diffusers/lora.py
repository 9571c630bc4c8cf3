"""Merges LoRA adapters into the weights of a diffusers pipeline, after checking that every module of a file matches."""

import re
from typing import Any

import torch

from sglang_gen.backends.diffusers import quantize
from sglang_gen.backends.diffusers.lora_layout import LORA_ERRORS, Target, targets
from sglang_gen.config.schema import Adapter, Lora
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.weights.lora import file as lora_file
from sglang_gen.weights.lora.file import LoraFile, read

TEXT_ENCODER = re.compile(r"lora_te\d*_|(base_model\.model\.)?text_encoder(_\d)?\.")  # modules of text encoders


def adapters(lora: Lora) -> list[Adapter]:
    """The adapter of the flags, then those of `lora.adapters`. Raises UserError for a duplicate nickname."""
    first = [Adapter(lora.path, lora.nickname, lora.scale, lora.target_modules)] if lora.path else []
    chosen = [*first, *lora.adapters]
    names = [adapter.nickname for adapter in chosen]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"lora: two adapters are named '{name}'; give each its own nickname")
    for adapter in chosen:
        if adapter.path is None:
            raise UserError(f"lora: the adapter '{adapter.nickname}' has no path")
    return chosen


def check_local_adapters(lora: Lora) -> None:
    """Raises UserError for adapters that do not exist or cannot be merged, before anything is loaded."""
    for adapter in adapters(lora):
        lora_file.check_local_file(str(adapter.path))


def apply(pipeline: Any, lora: Lora) -> list[dict[str, Any]]:
    """Merge the adapters, one after the other: `W + scale * (alpha / rank) * B A`, added in float32.

    Returns one entry per adapter for the run record. Raises UserError for an adapter that cannot be read, that was made
    for another model, or that matches no module; an adapter that is refused does not change the pipeline.
    """
    chosen = adapters(lora)
    if chosen and not hasattr(pipeline, "lora_state_dict"):
        raise UserError(f"lora: {type(pipeline).__name__} takes no LoRA adapters")
    if chosen:
        quantize.refuse_merging(pipeline)
    return [_apply(pipeline, adapter) for adapter in chosen]


def _apply(pipeline: Any, adapter: Adapter) -> dict[str, Any]:
    path = str(adapter.path)
    file = read(path)
    kind = type(pipeline).__name__
    try:
        matched = targets(pipeline, file.modules)
    except UserError:
        raise
    except LORA_ERRORS as error:
        raise UserError(f"lora: {path} cannot be applied to this {kind}: {in_our_words(error)}") from error
    kept, required = _keep(matched, file, adapter.target_modules)
    if not required:
        raise UserError(f"lora: no module of {path} is among the target modules {', '.join(adapter.target_modules)}")
    placed = {source for target in kept for source in target.sources}
    if lost := sorted(required - placed):
        if texts := [module for module in lost if TEXT_ENCODER.match(module)]:
            raise UserError(
                f"lora: {path} also changes a text encoder, in modules such as {texts[0]}, which this "
                f"{kind} cannot take; --lora-target-modules can choose the modules of the network alone"
            )
        raise UserError(
            f"lora: {path} was made for another model: {len(lost)} of its {len(required)} modules have no place in "
            f"this {kind}, such as {lost[0]}; --lora-target-modules can choose among them"
        )
    for target in kept:
        _check_shape(pipeline, target, path)
    for target in kept:
        _merge(_module(pipeline, target), target, adapter.scale)
    return {
        "nickname": adapter.nickname, "path": path, "file": str(file.path), "scale": adapter.scale,
        "modules": len(kept), "merged": True,
    }  # fmt: skip


def _keep(matched: list[Target], file: LoraFile, wanted: list[str]) -> tuple[list[Target], set[str]]:
    """The targets that `wanted` names, and the file's modules that must match a module of the pipeline.

    A name is the last component of a module path, or a dotted suffix of it, as in the pipeline or in the file.
    """
    if not wanted:
        return matched, set(file.modules)

    def named(module: str) -> bool:
        return any(f".{module}".endswith(f".{name}") for name in wanted)

    by_file = {module for module in file.modules if named(module.removesuffix(".lora").removesuffix("_lora"))}
    kept = [target for target in matched if named(target.name) or target.sources & by_file]
    return kept, by_file | {source for target in kept for source in target.sources}


def _module(pipeline: Any, target: Target) -> Any:
    return getattr(pipeline, target.component).get_submodule(target.name)


def _check_shape(pipeline: Any, target: Target, path: str) -> None:
    weight = _module(pipeline, target).weight
    assert target.down is not None
    assert target.up is not None
    if not weight.is_floating_point():
        raise UserError(
            f"lora: {target.component}.{target.name} is quantized ({weight.dtype}), so nothing can be merged into it"
        )
    shape = [target.up.shape[0], *target.down.shape[1:]]
    if weight.numel() != torch.Size(shape).numel() or weight.shape[0] != shape[0]:
        raise UserError(
            f"lora: {path} was made for another model: it changes {target.component}.{target.name} as {shape}, "
            f"which is {[*weight.shape]} here"
        )


def _merge(module: Any, target: Target, scale: float) -> None:
    """Add `scale * up @ down` to the weight of a linear layer or convolution (whose `up` has a 1 x 1 kernel)."""
    weight = module.weight
    assert target.down is not None
    assert target.up is not None
    change = target.up.flatten(1) @ target.down.flatten(1)
    with torch.no_grad():
        merged = weight.float() + scale * change.reshape(weight.shape).to(weight.device)
        weight.copy_(merged)
