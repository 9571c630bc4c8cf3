"""Reads the headers of safetensors files without loading weights, and refuses pickled files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_gen.errors import UserError, first_line

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
        raise UserError(f"The weight file {path} is corrupt: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be read: {error.strerror or first_line(error)}") from None


def refuse_other_formats(path: Path, setting: str) -> None:
    """Raises UserError for a file name without the suffix .safetensors."""
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{setting}: {path} is pickled, which can run code, and is refused; convert it to safetensors, or use the "
            "author's .safetensors file"
        )
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{setting}: {path} is not a safetensors file (*.safetensors)")
