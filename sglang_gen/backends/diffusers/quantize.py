"""Quantizes the denoising networks of a loaded pipeline, and reads back which layers are quantized.

diffusers' torchao quantizer is applied layer by layer, after adapters were merged: an adapter cannot be merged into
8-bit weights.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

from sglang_gen.backends.diffusers.roles import denoisers
from sglang_gen.config.schema import QuantMethod
from sglang_gen.errors import UserError
from sglang_gen.perf.flops import compute_dtype, stored_bytes
from sglang_gen.plan.quantization import NO_MERGE, ON_LOAD


def apply(pipeline: Any, method: QuantMethod, device: str) -> str | dict[str, Any]:
    """Quantize if the method is int8 or fp8; return how the networks are quantized ("none" for plain weights).

    Raises UserError if a network has no layer that the method quantizes.
    """
    networks = denoisers(pipeline)
    if method in ON_LOAD:
        for name, network in networks.items():
            _quantize(name, network, method, device)
    here = method.name if method in ON_LOAD else QuantMethod.prequantized.name
    entries = {name: read_back(network) for name, network in networks.items()}
    quantized = {name: {"method": here, **entry} for name, entry in entries.items() if entry is not None}
    if not quantized:
        return "none"
    return next(iter(quantized.values())) if len(networks) == 1 else quantized


def _quantize(name: str, network: nn.Module, method: QuantMethod, device: str) -> None:
    """Quantize weights per output channel and activations dynamically per token, with torchao's 8-bit configs."""
    from diffusers import ModelMixin, TorchAoConfig
    from diffusers.quantizers import DiffusersAutoQuantizer

    if not isinstance(network, ModelMixin):
        raise UserError(
            f"quant={method.name}: {type(network).__name__} is not a network of diffusers and cannot be quantized"
        )
    if getattr(network, "is_quantized", False):
        raise UserError(f"quant={method.name}: the {name} is quantized already, by {network.quantization_method}")
    if method is QuantMethod.fp8 and compute_dtype(network) is not torch.bfloat16:
        raise UserError("quant=fp8 with a scale per channel supports only bfloat16 output; run with --dtype bfloat16")
    quantizer = DiffusersAutoQuantizer.from_config(TorchAoConfig(_configuration(method)), pre_quantized=False)
    quantizer.validate_environment()
    fp32: list[str] = list(getattr(network, "_keep_in_fp32_modules", None) or [])
    quantizer.preprocess_model(model=network, device_map=None, keep_in_fp32_modules=fp32)
    place = torch.device(device)
    for key, parameter in list(network.named_parameters()):
        if quantizer.check_if_quantized_param(network, parameter, key, {}, param_device=device):
            quantizer.create_quantized_param(network, parameter.detach(), key, place, {}, [])
    quantizer.postprocess_model(network)
    network.hf_quantizer = quantizer
    if read_back(network) is None:
        raise UserError(f"quant={method.name}: {type(network).__name__} has no linear layer that can be quantized")


def _configuration(method: QuantMethod) -> Any:
    from torchao import quantization

    if method is QuantMethod.int8:
        return quantization.Int8DynamicActivationInt8WeightConfig()
    return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())


def read_back(network: nn.Module) -> dict[str, Any] | None:
    """How a network is quantized; None if it is not.

    `layers` counts linear layers by the storage of their weights, `linears` all linear layers; `bytes` is the size of
    the weights, `plain_bytes` their size if they were stored in the compute dtype.
    """
    kinds: Counter[str] = Counter()
    linears = 0
    for module in network.modules():
        weight = getattr(module, "weight", getattr(module, "qweight", None))
        if not isinstance(module, nn.Linear) and not hasattr(module, "qweight"):
            continue
        linears += 1
        if isinstance(weight, torch.Tensor) and (kind := _storage(weight)):
            kinds[kind] += 1
    if not kinds:
        return None
    parameters = list(network.parameters())
    dtype = compute_dtype(network) or torch.float32
    return {
        "by": _library(network),
        "layers": dict(sorted(kinds.items())),
        "linears": linears,
        "bytes": sum(stored_bytes(parameter) for parameter in parameters),
        "plain_bytes": sum(_numbers(parameter) for parameter in parameters) * dtype.itemsize,
    }


def _library(network: nn.Module) -> str:
    """The library that quantized a network, as recorded by diffusers; it does not record nunchaku."""
    method = getattr(network, "quantization_method", None)
    return str(getattr(method, "value", method or "nunchaku"))


def _storage(weight: torch.Tensor) -> str | None:
    """How a quantized weight is stored: GGUF type, tensor class or dtype; None for a plain tensor."""
    if (block := getattr(weight, "quant_type", None)) is not None and hasattr(block, "name"):
        return str(block.name)
    kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
    if kind not in (torch.Tensor, nn.Parameter):
        return kind.__name__
    return (
        None if weight.is_floating_point() and weight.element_size() > 1 else str(weight.dtype).removeprefix("torch.")
    )


def _numbers(parameter: torch.Tensor) -> int:
    """Number of elements of the unquantized weight; GGUF and bitsandbytes tensors store its shape."""
    shape = getattr(parameter, "quant_shape", None) or getattr(getattr(parameter, "quant_state", None), "shape", None)
    return torch.Size(shape).numel() if shape is not None else parameter.numel()


def refuse_merging(pipeline: Any) -> None:
    """Raises UserError if a denoising network is quantized: `W + B A` needs the unquantized W."""
    for name, network in denoisers(pipeline).items():
        if entry := read_back(network):
            raise UserError(f"lora: the {name} is quantized by {entry['by']}, and {NO_MERGE}")
