"""GGUF files of a denoising network: reads the header and checks which tensors are quantized."""

from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError, in_our_words
from sglang_gen.hub.safetensors_header import Tensor
from sglang_gen.hub.weight_files import FLAG, few, locate

RESHAPED = "comfy.gguf.orig_shape."  # start of the metadata keys for tensors that were flattened to fit blocks
# Exceptions of the gguf package's reader for a file that is not valid GGUF.
CORRUPT = (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, OSError, MemoryError)


def read_header(path: Path) -> dict[str, Tensor]:
    """Tensors by name, with types and logical shapes. Raises UserError for a corrupt file or an unsupported type."""
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    try:
        reader = gguf.GGUFReader(path)
        tensors = {
            tensor.name: (tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)))
            for tensor in reader.tensors
        }
        flattened = sorted(key.removeprefix(RESHAPED) for key in reader.fields if key.startswith(RESHAPED))
    except CORRUPT as error:
        raise UserError(f"{FLAG}: the GGUF file {path} is corrupt: {in_our_words(error)}") from error
    if flattened:
        raise UserError(
            f"{FLAG}: {path} stores {len(flattened)} tensors in another shape than the network's ({few(flattened)}; "
            "their shapes are in its metadata, comfy.gguf.orig_shape), which diffusers does not read; give safetensors"
        )
    if not tensors:
        raise UserError(f"{FLAG}: the GGUF file {path} holds no tensors")
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    odd = {kind.name for kind, _ in tensors.values() if kind not in plain and kind not in SUPPORTED_GGUF_QUANT_TYPES}
    if odd:
        raise UserError(f"{FLAG}: {path} holds {', '.join(sorted(odd))} tensors, which diffusers cannot compute with")
    return {name: Tensor(kind.name, shape) for name, (kind, shape) in tensors.items()}


def check_file(given: str | None) -> None:
    """`read_header` of a --transformer-weights-path that is a GGUF file, for its refusals before a weight is read."""
    if given is not None and (files := locate(given)).is_gguf:
        read_header(files.paths[0])


def check_places(network: Any, path: Path) -> None:
    """Raises UserError if a tensor other than a linear layer's weight is quantized; only those are dequantized."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    wrong = [
        f"{name}.{key}"
        for name, module in network.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, GGUFParameter) and not (isinstance(module, GGUFLinear) and key == "weight")
    ]
    if wrong:
        raise UserError(
            f"{FLAG}: {path} quantizes {len(wrong)} tensors that are not weights of linear layers ({few(wrong)}); "
            "store those as F16 or F32"
        )
