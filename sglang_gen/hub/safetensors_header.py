"""Weight files before anything is loaded: of a safetensors file only the header is read, pickles are refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_gen.errors import UserError, first_line

PICKLED = "offers no safetensors weights, and pickled weights are refused"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Tensor:
    """The header's entry of one tensor; `dtype` in the words of its format."""

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
    """The header of a safetensors file: its tensors by name, and its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file by name. Raises UserError when it is not a whole one."""
    return {name: tensor.shape for name, tensor in read_header(path).tensors.items()}


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises UserError when it is not a whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            tensors = {name: Tensor(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
            return Header(tensors, file.metadata() or {})
    except SafetensorError as error:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"The weight file {path} is a Git LFS pointer: run 'git lfs pull'") from None
        raise UserError(f"The weight file {path} is corrupt: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be read: {error.strerror or first_line(error)}") from None


def refuse_other_formats(path: Path, setting: str) -> None:
    """Raises UserError for a file whose name says that it is no safetensors file."""
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{setting}: {path} is pickled, which can run code, and is refused; convert it to safetensors, or take the "
            "author's .safetensors file"
        )
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{setting}: {path} is no safetensors file (*.safetensors)")
