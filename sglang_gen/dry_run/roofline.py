"""The kernels of a rehearsed step, and how long they would take on a machine of known rates: a roofline.

Products take the longer of their arithmetic and their bytes, everything else its bytes. In compiled code what is no
product is fused with what lies between the same two products: it reads what was there before once, and writes only
what is read afterwards.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

Work = Counter[tuple[int, int]]  # (FLOPs, bytes) of a kernel -> how many of them


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`products` and `attention`, and the bytes of all that is `elementwise`; a multiplication and an addition are two.

    Attention is no operator in a rehearsal; it is told by `attended`.
    """

    def __init__(self, fused: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fused = fused
        self.products, self.attention, self.elementwise = Work(), Work(), 0
        self.turn = 0  # products so far: what lies between two of them is fused
        self.made: Any = WeakIdKeyDictionary()  # storage of a fused result -> its turn
        self.unwritten: Any = WeakIdKeyDictionary()  # storage of a fused result -> bytes that are not in memory
        self.unread: Any = WeakIdKeyDictionary()  # storage -> (turn of its last reading, bytes left to read in it)

    @property
    def flops(self) -> int:
        return sum(flops * calls for work in (self.products, self.attention) for (flops, _), calls in work.items())

    def attended(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """One attention of q `[B, H, L, D]` to k and v `[B, H, S, D]`: two products of `[L, S]`."""
        self._written([q, k, v])
        self.turn += 1
        flops = 4 * math.prod((*q.shape[:3], k.shape[2], q.shape[3]))
        self.attention[flops, sum(map(_bytes, (q, k, v, out)))] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs or {})), _tensors(out)
        known = {each.untyped_storage() for each in inputs}
        if not inputs or (not func._schema.is_mutable and all(each.untyped_storage() in known for each in outputs)):
            return out  # made of nothing, or a view
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self._written(inputs)
            self.turn += 1
            self.products[formula(*args, **(kwargs or {}), out_val=out), sum(map(_bytes, [*inputs, *outputs]))] += 1
        elif "empty" not in func.overloadpacket.__name__:
            self._elementwise(inputs, outputs)
        return out

    def _elementwise(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if not self.fused:
            self.elementwise += sum(map(_bytes, [*inputs, *outputs]))
            return
        earlier = [each for each in inputs if self.made.get(each.untyped_storage()) != self.turn]
        self._written(earlier)
        for each in earlier:
            self._read(each)
        for each in outputs:
            storage = each.untyped_storage()
            self.made[storage], self.unwritten[storage] = self.turn, storage.nbytes()

    def _written(self, tensors: Iterable[Tensor]) -> None:
        """What is read after a product, or by one, has to be in memory, if fused kernels made it."""
        for each in tensors:
            storage = each.untyped_storage()
            moved = min(self.unwritten.get(storage, 0), _bytes(each))
            if moved:
                self.unwritten[storage] -= moved
                self.elementwise += moved

    def _read(self, tensor: Tensor) -> None:
        """Once between two products."""
        storage = tensor.untyped_storage()
        turn, left = self.unread.get(storage, (None, 0))
        left = left if turn == self.turn else storage.nbytes()
        moved = min(left, _bytes(tensor))
        self.unread[storage] = (self.turn, left - moved)
        self.elementwise += moved


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """That a kernel reads or writes; of what is expanded, what is there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def seconds(work: Work, tflops: float, gb_per_s: float) -> float:
    """Of kernels one after the other, each bound by its arithmetic or by its bytes."""
    return sum(calls * max(flops / (tflops * 1e12), moved / (gb_per_s * 1e9)) for (flops, moved), calls in work.items())
