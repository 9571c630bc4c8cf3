"""Reads checkpoints of a denoising network in its authors' layout and converts them to diffusers' tensor names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sglang_gen.hub.single_file import INSIDE
from sglang_gen.weights import original_flux as original_names

# Exceptions of diffusers' conversions for the file of another network.
CONVERSION_ERRORS = (KeyError, ValueError, RuntimeError, IndexError, AttributeError, TypeError, NameError)


def read(class_name: str, config: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of diffusers' `class_name` under its names, in the dtypes of the files.

    Tensors that are only renamed are views of the memory-mapped files; split fused projections are copies (views for
    FLUX), which the caller releases one by one. Raises one of `CONVERSION_ERRORS` for another network's files.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    from safetensors.torch import load_file

    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(INSIDE)} or tensors
    if class_name == "FluxTransformer2DModel":
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return original_names.convert({name.removeprefix(INSIDE): tensor for name, tensor in inside.items()}, width)
    convert = SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]
    converted = convert(config=dict(config), checkpoint=inside)
    return {name: tensor for name, tensor in converted.items() if tensor is not None}  # None: not in the checkpoint
