"""LoRA adapters on a diffusers pipeline: loaded by diffusers (PEFT and kohya layouts), checked, merged."""

from pathlib import Path
from typing import Any

from sglang_gen import log
from sglang_gen.backends.options import quantized
from sglang_gen.backends.options.networks import TEXT_ENCODERS, denoisers, modules
from sglang_gen.errors import UserError, first_line
from sglang_gen.schema import Adapter, Lora

ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError)


def adapters(lora: Lora) -> list[Adapter]:
    """The adapter of the flags, then those of `lora.adapters`. Raises UserError for a nickname that stands twice."""
    first = [Adapter(lora.path, lora.nickname, lora.scale, lora.target_modules)] if lora.path else []
    found = [*first, *lora.adapters]
    names = [adapter.nickname for adapter in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"lora: two adapters are named '{name}'; give each its own nickname")
    for adapter in found:
        if adapter.path is None:
            raise UserError(f"lora: the adapter '{adapter.nickname}' has no path")
    return found


def apply(pipeline: Any, lora: Lora) -> list[dict[str, Any]]:
    """Load and merge the adapters, one after the other: `W + scale * (alpha / rank) * B A`, as PEFT defines it.

    Returns one entry an adapter for the record. Raises UserError for one that cannot be read, that belongs to another
    model, or that matches no module.
    """
    chosen = adapters(lora)
    if not chosen:
        return []
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"lora: {type(pipeline).__name__} takes no LoRA adapters")
    quantized.refuse_merging(pipeline)
    report = []
    with log.quieter("diffusers.loaders"):  # its remarks on what did not fit are our errors
        for adapter in chosen:
            report.append(_load(pipeline, adapter))
            pipeline.set_adapters([adapter.nickname], [adapter.scale])
            pipeline.fuse_lora(adapter_names=[adapter.nickname])
            pipeline.unload_lora_weights()
    return report


def _load(pipeline: Any, adapter: Adapter) -> dict[str, Any]:
    path = str(adapter.path)
    if path.startswith(("/", ".", "~")) and not Path(path).expanduser().exists():
        raise UserError(f"lora: {path} does not exist")
    try:
        weights = _read(pipeline, path)
        kept = {key: value for key, value in weights.items() if _targets(key, adapter.target_modules)}
        if not kept:
            raise UserError(f"lora: no module of {path} is among the target modules {adapter.target_modules}")
        pipeline.load_lora_weights(kept, adapter_name=adapter.nickname)
    except UserError:
        raise
    except ERRORS as error:
        kind = type(pipeline).__name__
        raise UserError(f"lora: {path} cannot be applied to this {kind}: {first_line(error)}") from error
    matched, there = _matched(pipeline, adapter.nickname), _pairs(kept)
    if len(matched) < there:
        raise UserError(
            f"lora: {path} was made for another model: {len(matched)} of its {there} modules have a place in this "
            f"{type(pipeline).__name__}; --lora-target-modules can choose among them"
        )
    return {
        "nickname": adapter.nickname, "path": path, "scale": adapter.scale, "modules": len(matched), "merged": True,
    }  # fmt: skip


def _read(pipeline: Any, path: str) -> dict[str, Any]:
    """The adapter's weights in diffusers' own key layout, alphas included."""
    found = pipeline.lora_state_dict(path, use_safetensors=True)
    weights, alphas = found if isinstance(found, tuple) else (found, None)
    return {**weights, **{key: value for key, value in (alphas or {}).items() if key not in weights}}


def _targets(key: str, wanted: list[str]) -> bool:
    """True where the key's module is named by one of `wanted`: its last part, or a dotted end of it."""
    if not wanted:
        return True
    module = key.partition(".lora")[0].removesuffix(".alpha")
    return any(f".{module}".endswith(f".{name}") for name in wanted)


def _pairs(weights: dict[str, Any]) -> int:
    """Modules for which the adapter has a pair of factors."""
    return sum(
        any(mark in key for mark in (".lora_A.", ".lora_down.", ".lora.down.", "_layer.down.")) for key in weights
    )


def _matched(pipeline: Any, nickname: str) -> list[str]:
    """Names of the layers that hold the adapter."""
    networks = denoisers(pipeline) | modules(pipeline, TEXT_ENCODERS)
    return [
        f"{part}.{name}"
        for part, network in networks.items()
        for name, layer in network.named_modules()
        if nickname in getattr(layer, "lora_A", {})
    ]
