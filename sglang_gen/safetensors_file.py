"""Weight files before anything is loaded: of a safetensors file only the header is read, pickles are refused."""

from pathlib import Path

from sglang_gen.errors import UserError, first_line

PICKLED = "offers no safetensors weights, and pickled weights are refused"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
LFS_POINTER = b"version https://git-lfs"


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file by name. Raises UserError when it is not a whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
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
