"""Detects quantized weights by the header of a safetensors file, so that they are never loaded as plain weights.

Quantized weights are low-bit numbers with separate scales. A loader that does not know the format drops the scales, or
reads packed integers as floats, and the image is noise.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from sglang_gen.errors import UserError
from sglang_gen.hub.safetensors_header import Header, Tensor

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FN", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# Last parts of tensor names that occur only in quantized weights, and the format that uses them.
MARKS: Mapping[str, str] = {
    **dict.fromkeys(("scaled_fp8", "scale_weight", "scale_input"), "scaled fp8"),
    **dict.fromkeys(("weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale"), "scaled fp8 or int8"),
    **dict.fromkeys(("comfy_quant", "convrot", "weight_scale_hadamard"), "ComfyUI's quantization (comfy_quant)"),
    **dict.fromkeys(("absmax", "nested_absmax", "quant_map", "nested_quant_map"), "bitsandbytes"),
    **dict.fromkeys(("SCB", "weight_format"), "bitsandbytes"),
    **dict.fromkeys(("qweight", "qzeros", "g_idx"), "GPTQ, AWQ or SVDQuant"),
    **dict.fromkeys(("wscales", "wzeros", "wcscales", "smooth_factor", "proj_down", "proj_up"), "SVDQuant"),
    **dict.fromkeys(("_data", "_scale", "_shift"), "quanto"),
}
QUANT_STATE = re.compile(r"\.quant_state\.")  # bitsandbytes appends a name
DECLARATIONS = ("quantization_config", "_quantization_metadata")  # keys of a file's metadata
INTEGERS = ("position_ids", "num_batches_tracked", "relative_position_index", "token_type_ids", "num_updates")


def require_plain(path: Path, header: Header) -> None:
    """Raises UserError for a file that declares a quantization or holds quantized tensors."""
    evidence = quantized(header)
    if evidence:
        raise UserError(
            f"{path} holds quantized weights ({evidence}), which this version does not read; give the plain weights "
            "(float32, bfloat16 or float16) of the model"
        )


def quantized(header: Header) -> str | None:
    """A clause that names the quantization in a header, with an example tensor; None for plain weights."""
    for key in DECLARATIONS:
        if header.metadata.get(key, "null") != "null":
            return f"its metadata has the key {key}"
    for name, tensor in header.tensors.items():
        if kind := _format(name, tensor, header.tensors):
            return kind
    return None


def _format(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    last = name.rpartition(".")[2]
    if last in MARKS:
        return f"{MARKS[last]}: {name}"
    if QUANT_STATE.search(name):
        return f"bitsandbytes: {name}"
    if tensor.dtype in FLOAT_DTYPES:
        return None
    if tensor.dtype in EIGHT_BIT_FLOATS:  # without scales these are plain weights, cast to fp8
        scale = next((f"{name}{end}" for end in ("_scale", ".scale") if f"{name}{end}" in tensors), None)
        beside = f"{name.removesuffix('weight')}scale"
        scale = scale or (beside if name.endswith(".weight") and beside in tensors else None)
        return f"scaled fp8: {scale}" if scale else None
    if tensor.numbers == 0 or last in INTEGERS or (len(tensor.shape) < 2 and last not in ("weight", "bias")):
        return None
    return f"{name} is stored as {tensor.dtype}"
