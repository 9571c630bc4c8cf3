"""Reads the headers of safetensors files without loading weights, and refuses pickled files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError, in_our_words

PICKLED = "offers no safetensors weights, and pickled weights are refused"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Tensor:
    """Header entry of one tensor; `dtype` is safetensors' name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: its tensors by name, and its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name. Raises UserError for an incomplete or corrupt file."""
    return {name: tensor.shape for name, tensor in read_header(path).tensors.items()}


def is_pointer(path: Path) -> bool:
    """Whether the file is what Git LFS leaves in the place of one that was not downloaded."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file. Raises UserError for an incomplete or corrupt file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            tensors = {name: Tensor(item.get_dtype(), tuple(item.get_shape())) for name, item in slices.items()}
            return Header(tensors, file.metadata() or {})
    except SafetensorError as error:
        if is_pointer(path):
            raise UserError(f"The weight file {path} is a Git LFS pointer: run 'git lfs pull'") from None
        raise UserError(f"The weight file {path} is corrupt: {_damage(path)}") from error
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be read: {in_our_words(error)}") from error


def _damage(path: Path) -> str:
    """What is wrong with a file that is not a safetensors file: 8 bytes of length, a JSON header, then the tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            return f"it has {size} bytes, fewer than a header"
        if length > size - 8:
            return f"its header should have {length} bytes, and the file has {size}"
        try:
            entries = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return "its header is not valid JSON"
    ends = [end for item in _offsets(entries) if isinstance(end := item[-1], int)]
    if ends and max(ends) != size - 8 - length:
        return f"its tensors should have {max(ends)} bytes, and {size - 8 - length} follow its header"
    return "its header does not describe its tensors"


def _offsets(entries: Any) -> list[list[Any]]:
    """The places of the tensors in a header, as far as it has the form of one."""
    items = [item for name, item in entries.items() if name != "__metadata__"] if isinstance(entries, dict) else []
    found = [item.get("data_offsets") for item in items if isinstance(item, dict)]
    return [offsets for offsets in found if isinstance(offsets, list) and offsets]


def refuse_other_formats(path: Path, setting: str) -> None:
    """Raises UserError for a file name without the suffix .safetensors."""
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{setting}: {path} is pickled, which can run code, and is refused; convert it to safetensors, or use the "
            "author's .safetensors file"
        )
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{setting}: {path} is not a safetensors file (*.safetensors)")
