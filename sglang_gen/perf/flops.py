"""The work of a run: which networks were called with which shapes, and what such a call costs.

Calls are noted as they happen, shapes only. Afterwards each distinct call is repeated on a twin of the network on the
meta device, where torch's counter sees every product, attention included, and no arithmetic is done.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sglang_gen.tensor_tree import to_meta


@dataclass
class Call:
    """One distinct call: the network, its method, the arguments as meta tensors, and how often it was made."""

    stage: str
    name: str
    module: nn.Module
    method: str
    twin: Callable[[], Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    io_bytes: int
    count: int = 1


@dataclass
class CallLog:
    """Notes the calls of the watched networks while `on`."""

    on: bool = False
    calls: dict[str, Call] = field(default_factory=dict)

    def watch(
        self,
        stage: str,
        name: str,
        entrance: Any,
        method: str = "forward",
        module: nn.Module | None = None,
        twin: Callable[[], Any] | None = None,
    ) -> None:
        """Note every call of `entrance.method` as work of `stage`.

        `module` holds the weights, where the entrance is something before it; `twin` gives an entrance without memory.
        """
        network = entrance if module is None else module

        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.on:
                self._note(Call(stage, name, network, method, twin, args, kwargs, 0))

        if method == "forward" and isinstance(entrance, nn.Module):
            entrance.register_forward_pre_hook(lambda _module, args, kwargs: note(args, kwargs), with_kwargs=True)
            return
        inner: Callable[..., Any] = getattr(entrance, method)

        def noted(*args: Any, **kwargs: Any) -> Any:
            note(args, kwargs)
            return inner(*args, **kwargs)

        setattr(entrance, method, noted)

    def _note(self, call: Call) -> None:
        name, method, args, kwargs = call.name, call.method, call.args, call.kwargs
        leaves = list(_leaves((args, kwargs)))
        key = repr((name, method, sorted(kwargs), [_signature(leaf) for leaf in leaves]))
        if key in self.calls:
            self.calls[key].count += 1
            return
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        call.io_bytes = sum(leaf.numel() * leaf.element_size() for leaf in tensors)
        call.args, call.kwargs = to_meta((args, kwargs))
        self.calls[key] = call


def _signature(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf).__name__


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and plain values inside of lists, tuples, dicts and dataclasses."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def work(
    log: CallLog, stages_ms: Mapping[str, float], rates: Mapping[str, Any], sent: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """For each stage `{flops, bytes, mfu, bound}` against the machine's rates.

    `bytes` are the weights that a call uses and its inputs, once per call. `mfu` is flops over what the machine's
    matmul rate gives in the measured time. `bound` is the slowest of compute, memory and comm, for which `sent` has the
    bytes that left this rank in each stage; launch where the stage took over four times as long as any. A network that
    has no meta twin gives `{"reason": ...}` instead.
    """
    found: dict[str, dict[str, Any]] = {}
    for call in log.calls.values():
        entry = found.setdefault(call.stage, {"flops": 0, "bytes": 0})
        counted = count(call)
        if isinstance(counted, str):
            entry["reason"] = counted
            continue
        flops, share = counted
        weights = sum(stored_bytes(parameter) for parameter in call.module.parameters())
        entry["flops"] += flops * call.count
        entry["bytes"] += (int(share * weights) + call.io_bytes) * call.count
    return {
        stage: {"reason": entry["reason"]}
        if "reason" in entry
        else _judge(entry, stages_ms.get(stage, 0.0), rates, sent.get(stage, 0))
        for stage, entry in found.items()
    }


def _judge(entry: dict[str, Any], milliseconds: float, rates: Mapping[str, Any], sent: int) -> dict[str, Any]:
    peak, bandwidth, seconds = rates.get("matmul_tflops"), rates.get("memory_gb_per_s"), milliseconds / 1000
    if not peak or not bandwidth or seconds <= 0:
        return {**entry, "mfu": None, "bound": None}
    least = {"compute": entry["flops"] / (peak * 1e12), "memory": entry["bytes"] / (bandwidth * 1e9)}
    if link := rates.get("link_gb_per_s"):
        least["comm"] = sent / (link * 1e9)
    bound = max(least, key=least.__getitem__)
    if seconds > 4 * least[bound]:
        bound = "launch"
    mfu = least["compute"] / seconds
    return {**entry, "mfu": round(mfu, 4) if math.isfinite(mfu) else None, "bound": bound}


class Used(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which of some tensors are used."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = {id(tensor): tensor.numel() for tensor in tensors}
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.sizes)
        return func(*args, **(kwargs or {}))

    def share(self) -> float:
        """Of their numbers."""
        total = sum(self.sizes.values())
        return sum(self.sizes[number] for number in self.seen) / total if total else 0.0


def count(call: Call) -> tuple[int, float] | str:
    """FLOPs of one call (a multiplication and an addition are two) and the share of the weights that it uses.

    In their place the reason why they cannot be counted.
    """
    try:
        twin = call.twin() if call.twin else _meta_twin(call.module, _dtype_of(call))
        weights = list((twin if isinstance(twin, nn.Module) else twin.network).parameters())
        with torch.no_grad(), Used(weights) as used, FlopCounterMode(display=False) as counter:
            getattr(twin, call.method)(*call.args, **call.kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        return f"{type(call.module).__name__} cannot be counted on meta: {str(error).splitlines()[0]}"
    return int(counter.get_total_flops()), used.share()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Memory of a weight: of a quantized one, its parts, since it reports the dtype that it stands for."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, name)) for name in flatten()[0])


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a network computes in: that of most of its numbers, else what its quantized layers unpack to."""
    numbers: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            numbers[parameter.dtype] += parameter.numel()
    unpacked = [getattr(child, "compute_dtype", None) for child in module.modules()]
    return next((dtype for dtype in unpacked if dtype is not None), numbers.most_common(1)[0][0] if numbers else None)


def _dtype_of(call: Call) -> torch.dtype:
    """The dtype for the twin; of a network without a plain number, that of its first floating argument."""
    tensors = [leaf for leaf in _leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]
    given = next((leaf.dtype for leaf in tensors if leaf.is_floating_point()), torch.float32)
    return compute_dtype(call.module) or given


def _meta_twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain network of the same configuration without memory; quantized products are as many as plain ones."""
    kind: Any = type(module)
    with torch.device("meta"):
        twin = kind.from_config(module.config) if hasattr(kind, "load_config") else kind(module.config)
    return nn.Module.to(twin, dtype).eval()  # type: ignore[no-any-return]
