"""Which operators a GPU refuses, and which of them make the host wait for the GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# Operators whose result depends on values, so that the host must read them.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.histc, aten.repeat_interleave,
}  # fmt: skip


def broken_rule(func: Any, tensors: list[Tensor]) -> str | None:
    """Why a GPU refuses an operator of these tensors; None if it does not."""
    packet = func.overloadpacket
    hosts = [tensor for tensor in tensors if tensor.device.type != "cuda"]
    if not hosts or len(hosts) == len(tensors) or packet in COPIES:
        return None
    if any(tensor.device.type != "cpu" for tensor in hosts):
        return f"a tensor on {hosts[0].device} meets one on cuda"
    if packet in INDEXING and tensors[0].device.type == "cuda":
        return None  # indices may be on the CPU, and are copied
    if torch.Tag.pointwise in func.tags and all(tensor.ndim == 0 for tensor in hosts):
        return None  # the kernel gets the number as an argument
    return f"a tensor {list(hosts[0].shape)} on cpu meets one on cuda"


def waits_for(func: Any, args: Any, kwargs: Any, target: torch.device | None) -> str | None:
    """Why the host waits for the GPU in this operator; None if it does not."""
    packet = func.overloadpacket
    if packet in WAITING:
        return "reads values of the GPU"
    if packet in INDEXING:
        indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
        if any(each.dtype == torch.bool for each in indices):
            return "counts the elements of a mask"
        return "copies an index to the GPU" if any(each.device.type == "cpu" for each in indices) else None
    if (ends := copied(func, args, target)) is None:
        return None
    source, non_blocking = _copy(packet, args, kwargs)
    if not non_blocking or ends.endswith("to cpu"):
        return ends
    return None if is_pinned(source) else f"{ends} from pageable memory"


def copied(func: Any, args: Any, target: torch.device | None) -> str | None:
    """The direction of a copy between host and GPU; None for other operators."""
    packet = func.overloadpacket
    if packet not in COPIES:
        return None
    if packet is aten._to_copy:
        source = args[0].device.type
        destination = target.type if target is not None else source
    else:
        destination, source = (each.device.type for each in args[:2])
    return None if source == destination or "meta" in (source, destination) else f"copies {source} to {destination}"


def _copy(packet: Any, args: Any, kwargs: Any) -> tuple[Tensor, bool]:
    """The source of a copy, and whether the caller asked not to wait for it."""
    if packet is aten._to_copy:
        return args[0], bool(kwargs.get("non_blocking"))
    return args[1], bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory."""
    copy = tensor.clone()
    copy.fake_pinned = True  # type: ignore[attr-defined]
    return copy


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "fake_pinned", False)
