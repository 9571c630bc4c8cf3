"""FLOPs and bytes of a run, counted from the shapes with which its networks were called.

Only the shapes of calls are recorded as they happen. Afterwards each distinct call is repeated on a copy of the network
on the meta device, where torch's FLOP counter sees every matrix product, attention included, and nothing is computed.
"""

import dataclasses
import math
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sglang_gen import log
from sglang_gen.tensor_tree import to_meta


@dataclass(frozen=True)
class Watched:
    """A network whose calls count as work of a stage.

    `module` holds the weights; `meta_copy` builds what is called on meta, if that is not a copy of the module.
    `variant` tells how the last call was computed, if calls of the same shapes differ; `meta_copy` gets it as argument.
    """

    stage: str
    name: str
    module: nn.Module
    meta_copy: Callable[..., Any] | None = None
    variant: Callable[[], Hashable] | None = None


@dataclass
class Call:
    """One distinct call: the network, its method, the arguments as meta tensors, and the number of such calls."""

    network: Watched
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    io_bytes: int
    variant: Hashable = None
    count: int = 1
    counted: "tuple[int, float] | str | None" = None  # the result of `count`, once it is known


@dataclass
class CallLog:
    """The calls of networks while `on` is True, as `watch`, `observed` or the caller of a network report them."""

    on: bool = False
    calls: dict[str, Call] = field(default_factory=dict)

    def watch(self, network: Watched) -> None:
        """Record every call of the module itself, through a forward hook."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.note(network, "forward", args, kwargs)

        network.module.register_forward_pre_hook(hook, with_kwargs=True)

    def observed(self, network: Watched, entrance: Any, *methods: str) -> Any:
        """`entrance` for callers whose calls of it, and of these methods of it, are recorded."""
        return Observed(entrance, methods, partial(self.note, network))

    def note(self, network: Watched, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record one call of a method, once it has returned."""
        if not self.on:
            return
        leaves = list(_leaves((args, kwargs)))
        variant = network.variant() if network.variant and method == "forward" else None
        key = repr((network.name, method, variant, sorted(kwargs), [_signature(leaf) for leaf in leaves]))
        if key in self.calls:
            self.calls[key].count += 1
            return
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        size = sum(leaf.numel() * leaf.element_size() for leaf in tensors)
        self.calls[key] = Call(network, method, to_meta(args), to_meta(kwargs), size, variant)


class Observed:
    """Has the interface of a network, and reports calls of it and of some of its methods."""

    def __init__(self, network: Any, methods: Collection[str], note: Callable[..., None]) -> None:
        """`note(method, args, kwargs)` is called after each call."""
        self._network, self._methods, self._note = network, methods, note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._network(*args, **kwargs)
        self._note("forward", args, kwargs)
        return result

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._network, name)
        if name not in self._methods:
            return method

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._note(name, args, kwargs)
            return result

        return noted


def _signature(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf).__name__


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and plain values inside lists, tuples, dicts and dataclasses."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def work(
    log: CallLog, stages_ms: Mapping[str, float], rates: Mapping[str, Any], sent: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """`{flops, bytes, mfu, bound}` of each stage, relative to the machine's rates.

    `bytes` counts the weights that a call uses and its inputs, once per call. `mfu` is flops divided by the machine's
    matmul rate times the measured time. `bound` is the slowest of compute, memory and comm, or launch if the stage took
    over four times as long as each of these; `sent` has the bytes that this rank sent in each stage. The entry is
    `{"reason": ...}` for a network that cannot run on meta.
    """
    stages: dict[str, dict[str, Any]] = {}
    for call in log.calls.values():
        entry = stages.setdefault(call.network.stage, {"flops": 0, "bytes": 0})
        counted = count_once(call)
        if isinstance(counted, str):
            entry["reason"] = counted
            continue
        flops, used_fraction = counted
        weights = sum(stored_bytes(parameter) for parameter in call.network.module.parameters())
        entry["flops"] += flops * call.count
        entry["bytes"] += (int(used_fraction * weights) + call.io_bytes) * call.count
    return {
        stage: {"reason": entry["reason"]}
        if "reason" in entry
        else _judge(entry, stages_ms.get(stage, 0.0), rates, sent.get(stage, 0))
        for stage, entry in stages.items()
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


def count_once(call: Call) -> tuple[int, float] | str:
    """The result of `count`, which is kept with the call."""
    if call.counted is None:
        call.counted = count(call)
    return call.counted


def total_flops(log: CallLog) -> int | None:
    """FLOPs of all recorded calls; None if one of them cannot be counted."""
    counted = [(count_once(call), call.count) for call in log.calls.values()]
    if any(isinstance(each, str) for each, _ in counted):
        return None
    return sum(each[0] * times for each, times in counted if not isinstance(each, str))


class Used(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which of the given tensors are used."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = {id(tensor): tensor.numel() for tensor in tensors}
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.sizes)
        return func(*args, **(kwargs or {}))

    def fraction(self) -> float:
        """Fraction of the tensors' elements that were used."""
        total = sum(self.sizes.values())
        return sum(self.sizes[number] for number in self.seen) / total if total else 0.0


def count(call: Call) -> tuple[int, float] | str:
    """FLOPs of one call (a multiply-add counts as two) and the fraction of the weights that it uses.

    Returns the reason as a string if they cannot be counted.
    """
    build, module = call.network.meta_copy, call.network.module
    variant = () if call.variant is None else (call.variant,)
    try:
        copy = build(*variant) if build else _meta_copy(module, _dtype_of(call))
        weights = list((copy if isinstance(copy, nn.Module) else copy.network).parameters())
        with torch.no_grad(), Used(weights) as used, FlopCounterMode(display=False) as counter:
            getattr(copy, call.method)(*call.args, **call.kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        log.debug(f"{type(module).__name__}.{call.method} cannot be counted on meta:\n{traceback.format_exc()}")
        return f"{type(module).__name__} cannot be counted on meta"
    return int(counter.get_total_flops()), used.fraction()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Memory of a weight in bytes; a quantized tensor reports its original dtype, so its inner tensors are summed."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, name)) for name in flatten()[0])


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a network computes in: that to which quantized layers unpack, else that of most parameters."""
    elements: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            elements[parameter.dtype] += parameter.numel()
    unpacked = [getattr(child, "compute_dtype", None) for child in module.modules()]
    return next((dtype for dtype in unpacked if dtype is not None), elements.most_common(1)[0][0] if elements else None)


def _dtype_of(call: Call) -> torch.dtype:
    """The dtype of the meta copy; that of the first floating-point argument if no parameter is of a plain dtype."""
    tensors = [leaf for leaf in _leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]
    given = next((leaf.dtype for leaf in tensors if leaf.is_floating_point()), torch.float32)
    return compute_dtype(call.network.module) or given


def _meta_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An unquantized network of the same config on meta; quantization does not change the number of FLOPs."""
    kind: Any = type(module)
    with torch.device("meta"):
        copy = kind.from_config(module.config) if hasattr(kind, "load_config") else kind(module.config)
    return nn.Module.to(copy, dtype).eval()  # type: ignore[no-any-return]
