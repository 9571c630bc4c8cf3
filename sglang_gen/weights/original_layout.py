"""Reads checkpoints of a denoising network in its authors' layout and converts them to diffusers' tensor names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sglang_gen.families import registry
from sglang_gen.hub.single_file import INSIDE

# Exceptions of diffusers' conversions for the file of another network.
CONVERSION_ERRORS = (KeyError, ValueError, RuntimeError, IndexError, AttributeError, TypeError, NameError)
Conversion = Callable[[Mapping[str, Any], dict[str, Tensor]], dict[str, Tensor]]  # of a config and tensors by name


def conversion(names: Sequence[str]) -> Conversion | None:
    """The conversion into diffusers' layout for a class of diffusers, given by its name and those of its bases.

    A family's own conversion replaces diffusers' on both backends. None where neither has one.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    for name in names:
        if own := registry.conversion(name):
            return own
        if name in SINGLE_FILE_LOADABLE_CLASSES:
            mapping = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
            return lambda config, tensors: _present(mapping(config=dict(config), checkpoint=tensors))
    return None


def _present(converted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without the entries that diffusers leaves as None, for names that the checkpoint does not have."""
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def read(class_name: str, config: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of diffusers' `class_name` under its names, in the dtypes of the files.

    Tensors that are only renamed are views of the memory-mapped files; split fused projections are copies (views if
    the family converts them), which the caller releases one by one. Raises one of `CONVERSION_ERRORS` for the files of
    another network.
    """
    from safetensors.torch import load_file

    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(INSIDE)} or tensors
    convert = conversion([class_name])
    if convert is None:
        raise KeyError(class_name)
    return convert(config, inside)
