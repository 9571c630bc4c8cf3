"""Compiles and loads the device guard, without which a CPU build of torch refuses tensors on "cuda"."""

import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("no_op_guard.cpp")


def compiler() -> str | None:
    """The C++ compiler of this machine, if it has one."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@functools.cache
def load() -> None:
    """Load the guard for the rest of the process; it is compiled once for each version of torch, in about 3 s.

    The compiler is called as `torch.utils.cpp_extension` calls it, without ninja and without the lock that a killed
    process would leave behind.
    """
    from torch.utils import cpp_extension

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = Path(cpp_extension.get_default_build_root()) / f"fake_cuda_{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            _compile(built)
            built.replace(library)
    torch.ops.load_library(library)


def _compile(library: Path) -> None:
    from torch.utils import cpp_extension

    command = compiler()
    assert command is not None
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    words = [command, "-shared", "-fPIC", "-std=c++20", *includes, str(SOURCE), "-o", str(library), *libraries, "-lc10"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
