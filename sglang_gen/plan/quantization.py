"""Checks of the group quant, made before a weight is read: contradictions, and required packages and hardware."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_gen import env
from sglang_gen.config.schema import QuantMethod, Run
from sglang_gen.errors import UserError, nearest
from sglang_gen.hub import weight_files
from sglang_gen.types import DENOISERS, ModelCard

WEIGHTS_FLAG = weight_files.FLAG
ON_LOAD = (QuantMethod.int8, QuantMethod.fp8)  # methods that quantize plain weights when they are loaded
ON_GPU = ("bitsandbytes", "modelopt", "nunchaku_lite", "bfl")  # methods that diffusers runs on a GPU only
# The keys of --nunchaku-config and their legal values.
NUNCHAKU_KEYS: dict[str, tuple[Any, ...]] = {
    "precision": ("int4", "nvfp4"),
    "rank": (16, 32, 64, 128, 256),
    "attention": ("flashattn2", "nunchaku-fp16"),
}


@dataclass(frozen=True)
class Facts:
    """Properties of a machine: the compute capability of its GPU, and whether nunchaku's own package is installed."""

    capability: tuple[int, int] | None = None
    nunchaku: bool = False


def denoisers(card: ModelCard) -> list[str]:
    """Names of the model's denoising networks."""
    return [name for name in DENOISERS if name in card.components]


def wants_nunchaku(run: Run) -> bool:
    return run.quant.method is QuantMethod.nunchaku or bool(run.quant.nunchaku_config)


def is_requested(run: Run) -> bool:
    """Whether the run requests any quantization or replaces the network's weights."""
    return run.quant.method is not QuantMethod.none or bool(run.quant.transformer_weights_path) or wants_nunchaku(run)


def check_quantization(run: Run) -> None:
    """Raises UserError for settings that are invalid for every model and machine."""
    quant = run.quant
    _check_nunchaku_config(quant.nunchaku_config)
    if quant.nunchaku_config and quant.method not in (QuantMethod.none, QuantMethod.nunchaku):
        raise UserError(f"quant={quant.method.name} and --nunchaku-config exclude each other; give one")
    if quant.transformer_weights_path is None:
        if wants_nunchaku(run):
            raise UserError(f"quant=nunchaku loads SVDQuant files and does not make them; name one with {WEIGHTS_FLAG}")
    else:
        both = [name for name in DENOISERS if name in run.model.component_paths]
        if both:
            raise UserError(
                f"--component-paths '{both[0]}' and {WEIGHTS_FLAG} name the same network twice; give one of them"
            )
        _check_file(run, weight_files.locate(quant.transformer_weights_path))
    if quant.method in ON_LOAD and env.package_version("torchao") is None:
        raise UserError(f"quant={quant.method.name} needs torchao: pip install 'sglang-gen[quant]'")


def _check_file(run: Run, files: weight_files.WeightFiles) -> None:
    quantized = None
    if files.is_gguf:
        quantized = "a GGUF file"
        if env.package_version("gguf") is None:
            raise UserError(
                f"{WEIGHTS_FLAG}: {files.given} is a GGUF file, which needs gguf: pip install 'sglang-gen[gguf]'"
            )
    elif declaration := weight_files.declared(files.config, {}):
        quantized = f"quantized already, by {declaration['method']}"
    method = "nunchaku" if wants_nunchaku(run) else run.quant.method.name
    if quantized and (run.quant.method in ON_LOAD or (wants_nunchaku(run) and files.is_gguf)):
        raise UserError(f"quant={method}: {files.given} is {quantized}; run with quant=prequantized")
    if quantized and (run.lora.path or run.lora.adapters):
        raise UserError(f"lora: {files.given} is {quantized}, and {NO_MERGE}")


NO_MERGE = "an adapter cannot be merged into quantized weights; merge it into plain ones (quant=int8 does so first)"


def _check_nunchaku_config(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key not in NUNCHAKU_KEYS:
            raise UserError(f"--nunchaku-config: unknown key '{key}'{nearest(key, NUNCHAKU_KEYS)}")
        if value not in NUNCHAKU_KEYS[key] or isinstance(value, bool):
            legal = ", ".join(map(str, NUNCHAKU_KEYS[key]))
            raise UserError(f"--nunchaku-config: '{key}' is {value!r}; legal: {legal}")


def check_model(run: Run, card: ModelCard, facts: Facts) -> None:
    """Raises UserError for settings that this model or this machine does not support."""
    for name, own in _own_methods(run, card).items():
        if run.lora.path or run.lora.adapters:
            raise UserError(f"lora: the {name} of {card.name} is quantized by {own}, and {NO_MERGE}")
        if own in ON_GPU and facts.capability is None:
            raise UserError(f"The {name} of {card.name} is quantized by {own}, which diffusers runs on a GPU only")
    if not is_requested(run):
        return
    names, method = denoisers(card), run.quant.method
    if not names:
        raise UserError(f"quant: {card.name} has no {' or '.join(DENOISERS)}, and only these networks are quantized")
    if run.quant.transformer_weights_path:
        if len(names) > 1:
            raise UserError(f"{WEIGHTS_FLAG}: {card.name} has {' and '.join(names)}; name each with --component-paths")
    else:
        _check_own(card, names, run)
    refusal = {QuantMethod.fp8: refuse_fp8, QuantMethod.nunchaku: refuse_nunchaku}.get(method)
    if wants_nunchaku(run):
        refusal = refuse_nunchaku
    if refusal and (sentence := refusal(facts)):
        raise UserError(sentence)


def _check_own(card: ModelCard, names: list[str], run: Run) -> None:
    """Raises UserError if the model's own weights are quantized under int8 or fp8, or plain under prequantized."""
    method, own = run.quant.method, _own_methods(run, card)
    for name in names:
        if name in own and method in ON_LOAD:
            raise UserError(f"quant={method.name}: the {name} of {card.name} is quantized already, by {own[name]}")
        if method is QuantMethod.prequantized and name not in own and name not in run.model.component_paths:
            raise UserError(
                f"quant=prequantized: the weights of {card.name} are plain; name quantized ones with {WEIGHTS_FLAG}"
            )


def _own_methods(run: Run, card: ModelCard) -> dict[str, str]:
    """Quantization method declared in the model's own folder, by network; without networks that are replaced."""
    if run.quant.transformer_weights_path:
        return {}
    names = [name for name in denoisers(card) if name not in run.model.component_paths]
    declarations = {name: weight_files.declared(card.components[name].config, {}) for name in names}
    return {name: entry["method"] for name, entry in declarations.items() if entry}


def expected(run: Run, card: ModelCard) -> str:
    """The method expected to take effect: the requested one, or prequantized if the weights declare a quantization."""
    if wants_nunchaku(run):
        return QuantMethod.nunchaku.name
    path = run.quant.transformer_weights_path
    files = weight_files.locate(path) if path else None
    quantized = files and (files.is_gguf or weight_files.declared(files.config, {}))
    return QuantMethod.prequantized.name if quantized or _own_methods(run, card) else run.quant.method.name


def refuse_fp8(facts: Facts) -> str | None:
    """The error sentence for a machine without fp8 matrix products; None if it has them."""
    if facts.capability is None:
        return "quant=fp8 multiplies in fp8, which needs a GPU (sm89 or later); on the CPU run with quant=int8"
    if facts.capability < (8, 9):
        return f"quant=fp8 needs a GPU of sm89 or later and this one is {_sm(facts)}; run with quant=int8"
    return None


def refuse_nunchaku(facts: Facts, precision: str | None = None) -> str | None:
    """The error sentence for a machine on which nunchaku's kernels do not run; None if they do."""
    needs = (
        "nunchaku needs a GPU with INT4 tensor cores (sm8x, sm12x) and the wheel of its own project "
        "(github.com/nunchaku-tech/nunchaku; the package of that name on PyPI is a different one)"
    )
    later = "run with quant=int8 on plain weights, until the native engine loads these files anywhere"
    if facts.capability is None:
        return f"{needs}, and this run is on the CPU; {later}"
    if facts.capability[0] not in (8, 12):
        return f"{needs}, and this GPU is {_sm(facts)}; {later}"
    if not facts.nunchaku:
        return f"{needs}, and that wheel is not installed here; install it, or {later}"
    wanted = "nvfp4" if facts.capability[0] == 12 else "int4"
    if precision is not None and precision != wanted:
        return f"nunchaku: the weights are {precision} and this GPU ({_sm(facts)}) takes {wanted}; get that file"
    return None


def _sm(facts: Facts) -> str:
    assert facts.capability is not None
    return f"sm{facts.capability[0]}{facts.capability[1]}"


def facts_of(device: str) -> Facts:
    """The `Facts` of this machine for a run on `device`."""
    if device != "cuda":
        return Facts(None, env.has_nunchaku())
    import torch

    return Facts(torch.cuda.get_device_capability(), env.has_nunchaku())
