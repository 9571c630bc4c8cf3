"""Every tensor that is made from nothing states its device: without one it is made on the CPU, which no CPU notices."""

import ast
from pathlib import Path

import pytest

import sglang_gen

PACKAGE = Path(sglang_gen.__file__).parent
FOLDERS = ("models", "families", "engine", "parallel")
# Functions of torch that make a tensor from sizes, numbers or arrays.
FACTORIES = {
    "zeros", "ones", "full", "empty", "empty_strided", "empty_permuted", "eye", "arange", "range", "linspace",
    "logspace", "tensor", "as_tensor", "asarray", "scalar_tensor", "from_numpy", "frombuffer", "from_file", "rand",
    "randn", "randint", "randperm", "normal", "complex", "tril_indices", "triu_indices", "bartlett_window",
    "blackman_window", "hamming_window", "hann_window", "kaiser_window", "Tensor", "FloatTensor", "LongTensor",
}  # fmt: skip
# Calls that were looked at: (file, call) -> why it names no device.
REVIEWED = {
    ("models/sd3.py", "torch.empty(1, config.positions ** 2, config.width)"):
        "a buffer of a network, which is built on the meta device as its parameters are",
    ("engine/flow_match_euler.py", "torch.from_numpy(self._shifted(levels, mu))"):
        "noise levels stay on the CPU, where the loop reads them without waiting for the GPU",
    ("parallel/mesh.py", "torch.frombuffer(bytearray(data), dtype=torch.uint8)"):
        "bytes that gloo sends; a buffer of Python is on the CPU",
    ("parallel/rank_connections.py", "torch.frombuffer(bytearray(own.to_bytes()), dtype=torch.uint8)"):
        "likewise",
    ("parallel/rank_connections.py", "torch.frombuffer(memory, dtype=torch.uint8)"):
        "memory that is mapped is on the CPU",
}  # fmt: skip


def without_device(source: str) -> list[tuple[int, str]]:
    """(line, call) of every call of a factory that names no device, and of every import of one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [(node.lineno, alias.name) for alias in node.names if alias.name in FACTORIES - {"Tensor"}]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_factory = ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES
        if is_factory and not any(keyword.arg == "device" for keyword in node.keywords):
            found.append((node.lineno, ast.unparse(node)))
    return found


def test_every_tensor_is_made_on_a_stated_device():
    paths = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))]
    assert len(paths) >= 50
    calls = [
        (str(path.relative_to(PACKAGE)), line, call)
        for path in paths
        for line, call in without_device(path.read_text(encoding="utf-8"))
    ]
    assert [f"{file}:{line}: {call}" for file, line, call in calls if (file, call) not in REVIEWED] == []
    assert {(file, call) for file, _, call in calls} == REVIEWED.keys()  # none that is gone


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = torch.arange(3)", [1]),
        ("x = torch.arange(3, device=y.device)", []),
        ("x = torch.zeros_like(y) + y.new_ones(3)", []),
        ("from torch import linspace", [1]),
        ("from torch import Tensor, nn", []),
        ("\nx = f(torch.tensor([1.0]).to(device))", [2]),
        ("x = torch.from_numpy(y)", [1]),
    ],
)
def test_what_counts_as_a_tensor_without_a_device(source, lines):
    assert [line for line, _ in without_device(source)] == lines
