"""What ranks along one axis of the mesh say to each other: sums, gathers and exchanges of tensors.

On the meta device nothing is sent and only shapes come back, so that a layout can be rehearsed without its ranks. In
compiled code each collective is one operator. Whoever listens is told of every collective and of the bytes that it
takes out of this rank: of a sum 2 (n - 1) / n of the tensor, as a ring of n ranks sends it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn import functional as F


@dataclass(frozen=True)
class Axis:
    """The ranks of a process group as one of them sees it. A group without a name is only rehearsed."""

    name: str
    size: int
    index: int
    group: str = ""


@dataclass
class Traffic:
    """For each collective, as "all_reduce tp", how often it was called and the bytes that it took out of this rank."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, collective: str, size: int) -> None:
        self.calls[collective] = self.calls.get(collective, 0) + 1
        self.bytes[collective] = self.bytes.get(collective, 0) + size


_listening: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Inside, collectives are counted."""
    traffic = Traffic()
    _listening.append(traffic)
    try:
        yield traffic
    finally:
        _listening.remove(traffic)


def _tell(collective: str, axis: str, size: float) -> None:
    for traffic in _listening:
        traffic.add(f"{collective} {axis}", math.ceil(size))


def _group(axis: Axis) -> Any:
    """The process group: compiled code knows it by its name alone."""
    return distributed_c10d._resolve_process_group(axis.group)  # type: ignore[arg-type, attr-defined]


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Pending:
    """A tensor that is on its way."""

    def __init__(self, tensor: Tensor, source: Tensor, work: "dist.Work | None" = None) -> None:
        self.tensor, self.source, self.work = tensor, source, work

    def wait_before(self, x: Tensor) -> Tensor:
        """`x` once all is sent, where nothing comes: compiled code drops an exchange of which nothing depends on."""
        arrived = self.wait()
        if torch.compiler.is_compiling():
            after: Tensor = _after(x, arrived)
            return after
        return x

    def wait(self) -> Tensor:
        if torch.compiler.is_compiling():
            arrived: Tensor = _arrived(self.tensor, self.source)
            return arrived
        if self.work is not None:
            self.work.wait()
        return self.tensor


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks."""
    if torch.compiler.is_compiling():
        summed: Tensor = _all_reduce(x, axis.group, axis.name, axis.size)
        return summed
    _tell("all_reduce", axis.name, 2 * (axis.size - 1) / axis.size * _size(x))
    total = x.contiguous() if x.is_meta else x.clone(memory_format=torch.contiguous_format)
    if not x.is_meta:
        dist.all_reduce(total, group=_group(axis))
    return total


def gather(x: Tensor, axis: Axis) -> Pending:
    """`[...]`, of the same shape on all ranks -> `[ranks, ...]`."""
    if torch.compiler.is_compiling():
        return Pending(_gather(x, axis.group, axis.name, axis.size), x)
    _tell("all_gather", axis.name, (axis.size - 1) * _size(x))
    x = x.contiguous()
    found = x.new_empty((axis.size, *x.shape))
    if x.is_meta:
        return Pending(found, x)
    group = _group(axis)
    return Pending(found, x, dist.all_gather_into_tensor(found.view(-1), x.view(-1), group=group, async_op=True))


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Pending:
    """All-to-all of a flat tensor: `sent[r]` of its numbers go to rank r, one after the other; `received[r]` come."""
    if torch.compiler.is_compiling():
        return Pending(_exchange(x, list(sent), list(received), axis.group, axis.name, axis.index), x)
    _tell("all_to_all", axis.name, (sum(sent) - sent[axis.index]) * x.element_size())
    found = x.new_empty(sum(received))
    if x.is_meta:
        return Pending(found, x)
    group = _group(axis)
    work = dist.all_to_all_single(found, x, list(received), list(sent), group=group, async_op=True)
    return Pending(found, x, work)


def start_along(x: Tensor, dim: int, lengths: Sequence[int], axis: Axis) -> Pending:
    """Begin to gather parts that differ in length along `dim`, where rank r has `lengths[r]`; see `put_along`."""
    longest = max(lengths)
    x = x.movedim(dim, 0)
    return gather(F.pad(x, (0, 0) * (x.ndim - 1) + (0, longest - len(x))) if len(x) < longest else x, axis)


def put_along(found: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
    """What `start_along` began, gathered: the parts one after the other."""
    whole = torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])
    return whole.movedim(0, dim)


def gather_along(x: Tensor, dim: int, lengths: Sequence[int], axis: Axis) -> Tensor:
    """The parts of all ranks one after the other along `dim`, where rank r has `lengths[r]`."""
    return put_along(start_along(x, dim, lengths, axis).wait(), dim, lengths)


# The same as operators. They wait only in `_arrived`, which reads the source too, so that it lives that long, and in
# the order of the program: lowering.py says both to inductor. Each started collective is remembered by the memory
# that it writes to.
_started: dict[int, "dist.Work"] = {}


def _start(pending: Pending) -> Tensor:
    if pending.work is not None and pending.tensor.numel():
        _started[pending.tensor.data_ptr()] = pending.work
    elif pending.work is not None:  # nothing comes, and so there is no memory to remember it by
        pending.work.wait()
    return pending.tensor


@torch.library.custom_op("sglang_gen::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, group: str, name: str, size: int) -> Tensor:
    return all_reduce(x, Axis(name, size, 0, group))


@torch.library.custom_op("sglang_gen::gather", mutates_args=())
def _gather(x: Tensor, group: str, name: str, size: int) -> Tensor:
    return _start(gather(x, Axis(name, size, 0, group)))


@torch.library.custom_op("sglang_gen::exchange", mutates_args=())
def _exchange(x: Tensor, sent: list[int], received: list[int], group: str, name: str, index: int) -> Tensor:
    return _start(exchange(x, sent, received, Axis(name, len(sent), index, group)))


@torch.library.custom_op("sglang_gen::arrived", mutates_args=())
def _arrived(x: Tensor, source: Tensor) -> Tensor:
    if x.numel():
        _started.pop(x.data_ptr()).wait()
    return x.clone()


@torch.library.custom_op("sglang_gen::after", mutates_args=())
def _after(x: Tensor, arrived: Tensor) -> Tensor:
    return x.clone()


@_all_reduce.register_fake
def _(x: Tensor, group: str, name: str, size: int) -> Tensor:
    return x.new_empty(x.shape)


@_gather.register_fake
def _(x: Tensor, group: str, name: str, size: int) -> Tensor:
    return x.new_empty((size, *x.shape))


@_exchange.register_fake
def _(x: Tensor, sent: list[int], received: list[int], group: str, name: str, index: int) -> Tensor:
    return x.new_empty(sum(received))


@_arrived.register_fake
def _(x: Tensor, source: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_after.register_fake
def _(x: Tensor, arrived: Tensor) -> Tensor:
    return torch.empty_like(x)
