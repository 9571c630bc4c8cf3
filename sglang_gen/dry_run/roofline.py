"""Roofline model: the kernels of a step traced on meta, and their time on a machine of known rates.

The time of a matrix product or attention is the longer of its arithmetic and its memory traffic; every other kernel
takes the time of its memory traffic. In compiled code all other kernels between two products are fused: the fused
kernel reads each earlier tensor once, and writes only tensors that are read later.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

Work = Counter[tuple[int, int]]  # (FLOPs, bytes) of a kernel -> number of calls


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records matrix products, convolutions, attention, and the bytes of all element-wise kernels.

    A multiply-add is two FLOPs. On meta, attention is not an operator; it is recorded by calls of `add_attention`.
    """

    def __init__(self, fused: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fused = fused
        self.products, self.convolutions, self.attention, self.elementwise = Work(), Work(), Work(), 0
        self.others: Counter[tuple[str, int]] = Counter()  # (kind, bytes) of an element-wise kernel -> number of calls
        self.turn = 0  # number of products so far; element-wise kernels of the same turn are fused
        self.made: Any = WeakIdKeyDictionary()  # storage of a fused result -> its turn
        self.unwritten: Any = WeakIdKeyDictionary()  # storage of a fused result -> bytes not yet written to memory
        self.unread: Any = WeakIdKeyDictionary()  # storage -> (turn of its last read, bytes not yet read in that turn)

    @property
    def flops(self) -> int:
        return sum(flops * calls for work in self.all_products for (flops, _), calls in work.items())

    @property
    def all_products(self) -> tuple[Work, Work, Work]:
        return self.products, self.convolutions, self.attention

    def add_attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *mask: Tensor) -> None:
        """Record attention of q `[B, H, L, D]` to k and v `[B, H, S, D]`: two matrix products of 2 L S D FLOPs.

        A mask `[B, 1, 1, S]` is read, and saves no product.
        """
        self._written([q, k, v, *mask])
        self.turn += 1
        flops = 4 * math.prod((*q.shape[:3], k.shape[2], q.shape[3]))
        self.attention[flops, sum(map(_bytes, (q, k, v, out, *mask)))] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs or {})), _tensors(out)
        known = {tensor.untyped_storage() for tensor in inputs}
        if not inputs or (not func._schema.is_mutable and all(tensor.untyped_storage() in known for tensor in outputs)):
            return out  # a factory function or a view
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self._written(inputs)
            self.turn += 1
            work = self.convolutions if func is torch.ops.aten.convolution.default else self.products
            work[formula(*args, **(kwargs or {}), out_val=out), sum(map(_bytes, [*inputs, *outputs]))] += 1
        elif "empty" not in (name := func.overloadpacket.__name__):
            self.others[kind_of(name), sum(map(_bytes, [*inputs, *outputs]))] += 1
            self._elementwise(inputs, outputs)
        return out

    def _elementwise(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if not self.fused:
            self.elementwise += sum(map(_bytes, [*inputs, *outputs]))
            return
        earlier = [tensor for tensor in inputs if self.made.get(tensor.untyped_storage()) != self.turn]
        self._written(earlier)
        for tensor in earlier:
            self._read(tensor)
        for tensor in outputs:
            storage = tensor.untyped_storage()
            self.made[storage], self.unwritten[storage] = self.turn, storage.nbytes()

    def _written(self, tensors: Iterable[Tensor]) -> None:
        """Count the writes of fused results that a later turn reads, since these must be in memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            moved = min(self.unwritten.get(storage, 0), _bytes(tensor))
            if moved:
                self.unwritten[storage] -= moved
                self.elementwise += moved

    def _read(self, tensor: Tensor) -> None:
        """Count a read of `tensor`, at most once per turn."""
        storage = tensor.untyped_storage()
        turn, left = self.unread.get(storage, (None, 0))
        left = left if turn == self.turn else storage.nbytes()
        moved = min(left, _bytes(tensor))
        self.unread[storage] = (self.turn, left - moved)
        self.elementwise += moved


ACTIVATIONS = ("silu", "gelu", "sigmoid", "tanh", "softmax", "exp", "sin", "cos", "rsqrt", "pow", "erf")
NORMS = ("norm", "mean", "var", "sum")


def kind_of(operator: str) -> str:
    """Kind of an element-wise kernel. On a CPU functions of each number and reductions take longer than their bytes."""
    if any(name in operator for name in NORMS):
        return "norm"
    return "activation" if any(name in operator for name in ACTIVATIONS) else "move"


def _tensors(value: Any) -> list[Tensor]:
    return [item for item in tree_leaves(value) if isinstance(item, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes for `tensor`; an expanded tensor counts with the bytes in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def seconds(work: Work, tflops: float, gb_per_s: float) -> float:
    """Total time of kernels run in sequence, each bound by its arithmetic or its memory traffic."""
    return sum(calls * max(flops / (tflops * 1e12), moved / (gb_per_s * 1e9)) for (flops, moved), calls in work.items())
