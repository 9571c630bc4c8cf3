"""The fake GPU: a tensor subclass with its values on the CPU, and the mode that computes with it."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fake_cuda import guard
from fake_cuda.rules import broken_rule, copied, is_pinned, pinned, waits_for
from fake_cuda.stand_ins import MEMORY, stand_ins

CUDA = torch.device("cuda", 0)
PACKAGES = ("sglang_gen", "diffusers", "transformers")


class CudaTensor(Tensor):
    """A tensor on "cuda" whose values are those of `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "CudaTensor":
        tensor: CudaTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device=CUDA
        )
        tensor.host = host
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a fake CUDA tensor outside of the fake GPU")


_data: Any = torch.Tensor.data  # the descriptor of torch


def _get_data(tensor: Tensor) -> Tensor:
    return CudaTensor(tensor.host) if isinstance(tensor, CudaTensor) else _data.__get__(tensor)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`, which may move a tensor from one device to the other."""
    if isinstance(tensor, CudaTensor) or isinstance(value, CudaTensor):
        value = torch.nn.Parameter(value, tensor.requires_grad) if _is_parameter(tensor) else value.detach()
        torch.utils.swap_tensors(tensor, value)
    else:
        _data.__set__(tensor, value)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Note:
    """An operator that a GPU refuses, or that makes the host wait for it."""

    stage: str | None
    kind: str  # "device": tensors of different devices; "copy": between host and GPU; "wait": the host waits
    operator: str
    reason: str
    place: str  # file:line of the innermost frame in one of the packages


class FakeCuda(TorchDispatchMode):
    """Computes with CPU tensors what is on "cuda", and notes what a GPU would refuse or wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: Counter[Note] = Counter()
        self.operators: Counter[str | None] = Counter()  # operators on the GPU by stage
        self.stage: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        target = kwargs.get("device")
        target = torch.device(target) if target is not None else None
        if func is torch.ops.aten._pin_memory.default:
            return pinned(args[0])
        if func is torch.ops.aten.is_pinned.default:
            return is_pinned(args[0])
        if not any(isinstance(leaf, CudaTensor) for leaf in leaves) and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if func is torch.ops.aten._fused_sdp_choice.default:
            return 0  # the math kernel, whose operators exist everywhere
        self.operators[self.stage] += 1
        self._check(func, args, kwargs, target)
        if target is not None and target.type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*tree_map(on_host, args), **tree_map(on_host, {**kwargs, **_unpinned(kwargs)}))
        mutated = _mutated(func, args, kwargs)
        if mutated is not None:
            return mutated
        if target is not None and target.type != "cuda":
            return out
        return tree_map(lambda each: CudaTensor(each) if isinstance(each, Tensor) else each, out)

    def _check(self, func: Any, args: Any, kwargs: Any, target: torch.device | None) -> None:
        devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for kind, reason in (
            ("device", broken_rule(func, devices)),
            ("copy", copied(func, args, target)),
            ("wait", waits_for(func, args, kwargs, target)),
        ):
            if reason:
                self.notes[Note(self.stage, kind, str(func), reason, _place())] += 1

    def of(self, kind: str, stage: str | None = None) -> list[str]:
        """The notes of a kind, of one stage or of all, as lines."""
        return sorted(
            f"{note.stage}: {note.operator} {note.reason} at {note.place} ({count} x)"
            for note, count in self.notes.items()
            if note.kind == kind and (stage is None or note.stage == stage)
        )

    def places(self, kind: str) -> set[tuple[str | None, str]]:
        """(stage, file) of the notes of a kind."""
        return {(note.stage, note.place.partition(":")[0]) for note in self.notes if note.kind == kind}


def on_host(value: Any) -> Any:
    return value.host if isinstance(value, CudaTensor) else value


def _unpinned(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"pin_memory": False} if kwargs.get("pin_memory") else {}


def _mutated(func: Any, args: Any, kwargs: Any) -> Any:
    """The argument that an operator writes and returns; None for an operator that returns new tensors."""
    schema = func._schema
    if len(schema.returns) != 1 or (alias := schema.returns[0].alias_info) is None or not alias.is_write:
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[index]
    raise AssertionError(f"{func} returns what it writes and writes nothing")


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        for package in PACKAGES:
            if f"/{package}/" in frame.filename:
                return f"{package}/{frame.filename.rpartition(f'/{package}/')[2]}:{frame.lineno}"
    return "elsewhere"


@contextmanager
def fake_cuda(free: int = MEMORY, count: int = 1) -> Iterator[FakeCuda]:
    """A process that sees `count` GPUs and has `free` bytes of one. Needs a C++ compiler, see `guard.compiler`."""
    guard.load()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    gpu = FakeCuda()
    with ExitStack() as stack:
        for owner, name, value in stand_ins(gpu, free, count):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(patch.object(torch.Tensor, "data", property(_get_data, _set_data)))
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `param.data = ...` would keep the old host
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device="cuda") is made on the CPU and copied
        try:
            with gpu:
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            stack.enter_context(patch.object(torch.Tensor, "data", property(_get_data, _set_data)))
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
