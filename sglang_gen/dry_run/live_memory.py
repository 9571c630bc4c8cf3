"""Live bytes of a computation that is traced on the meta device, and its allocations in order."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sglang_gen.engine.attention_memory import FLOAT32, held_bytes
from sglang_gen.engine.meta_trace import fused_attention

Workspace = Callable[[Any, tuple[Any, ...], Any], int]  # (operator, arguments, result) -> bytes held during the call
Event = tuple[int, int | None]  # number of a block, and its bytes; None where it is released
RETURNED: Event = (0, None)  # freed memory is returned to the operating system


def no_workspace(func: Any, args: tuple[Any, ...], out: Any) -> int:
    return 0


def convolution_copies(func: Any, args: tuple[Any, ...], out: Any, channels_last: bool) -> int:
    """Bytes that a convolution of oneDNN, which torch calls on a CPU, holds besides its result.

    oneDNN computes in layouts of its own. With channels last it copies the weight alone. A plain input and weight are
    copied, then the result. A 1 x 1 convolution takes plain tensors, in half precision by way of sums in float32.
    """
    if func is not torch.ops.aten.convolution.default:
        return 0
    x, weight = args[0], args[1]
    if channels_last:
        return _bytes(weight)
    if weight.shape[2:].numel() == 1:
        return _bytes(x) + FLOAT32 * out.numel() if x.element_size() < FLOAT32 else 0
    return max(_bytes(x) + _bytes(weight), _bytes(out))


def workspace_on(device: str, channels_last: bool) -> Workspace:
    """The workspace of kernels on a device; that of cuDNN depends on its choice of algorithm."""
    return partial(convolution_copies, channels_last=channels_last) if device == "cpu" else no_workspace


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors, now and at their peak. The tensors in `known` are not counted.

    `workspace` is what kernels hold during a call. `events` has all allocations in order, numbered from 1.
    """

    def __init__(self, known: Iterable[Tensor], workspace: Workspace = no_workspace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.workspace = workspace
        self.events: list[Event] = []
        self.count = 0  # blocks so far
        self.seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self.seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        extra = self.workspace(func, args, out)
        if extra:
            number = self._allocate(extra)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if extra:
            self._release(number, extra)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the tensor from now on, until nothing refers to its storage."""
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = size
        weakref.finalize(storage, self._release, self._allocate(size), size).atexit = False

    def add_return(self) -> None:
        """Freed memory is returned to the operating system now."""
        self.events.append(RETURNED)

    def _allocate(self, size: int) -> int:
        self.count += 1
        self.now += size
        self.most = max(self.most, self.now)
        self.events.append((self.count, size))
        return self.count

    def _release(self, number: int, size: int) -> None:
        self.now -= size
        self.events.append((number, None))


class FusedAttention(TorchFunctionMode):
    """Replaces torch's scaled_dot_product_attention by a fused kernel: on meta torch would compute all scores.

    `on_attention` is called as by `trace_on_meta`.
    """

    def __init__(self, on_attention: Callable[..., None]) -> None:
        super().__init__()
        self.on_attention = on_attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3] if len(args) > 2 else ((kwargs or {})[name] for name in ("query", "key", "value"))
        out = fused_attention(q, k, v, partial(held_bytes, "sdpa"))
        self.on_attention(q, k, v, out)
        return out


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
