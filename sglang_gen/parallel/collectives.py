"""Collectives along one axis of the mesh: all-reduce, all-gather and all-to-all.

On the meta device nothing is sent and only shapes are returned, so a layout can be traced without its ranks. In
compiled code each collective is one operator. Inside `counted` every call is counted with the bytes that leave this
rank; an all-reduce over n ranks counts as 2 (n - 1) / n of the tensor, as in a ring.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn import functional as F

from sglang_gen.parallel import shared_memory
from sglang_gen.parallel.shared_memory import Channel, Transfer

# Bytes of a tensor up to which two ranks without shared memory add up gathered parts, which sends as much. Gloo's
# all-reduce of few bytes takes 0.7 ms longer than messages, and that of megabytes less.
GATHERED_SUM = 512 * 1024


@dataclass(frozen=True)
class Axis:
    """A process group as seen by one of its ranks. An axis without a group name is only traced on the meta device."""

    name: str
    size: int
    index: int
    group: str = ""


@dataclass
class Traffic:
    """Calls of each collective, such as "all_reduce tp", and the bytes that left this rank in them."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, collective: str, size: int) -> None:
        self.calls[collective] = self.calls.get(collective, 0) + 1
        self.bytes[collective] = self.bytes.get(collective, 0) + size

    def include(self, other: "Traffic", times: int = 1) -> None:
        """Add the calls and bytes of `other`, `times` over."""
        for name, count in other.calls.items():
            self.calls[name] = self.calls.get(name, 0) + times * count
            self.bytes[name] = self.bytes.get(name, 0) + times * other.bytes[name]


# The traffic that is being counted. Operators of compiled code take only strings and numbers, so no recorder can be
# handed to them, but they run in the thread that called the compiled code and see its context. Another thread counts
# for itself: a trace on meta beside a generation is not taken for what the generation sent.
_counting: ContextVar[tuple[Traffic, ...]] = ContextVar("counting", default=())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collectives that this thread calls inside the context."""
    traffic = Traffic()
    token = _counting.set((*_counting.get(), traffic))
    try:
        yield traffic
    finally:
        _counting.reset(token)


def _record(collective: str, axis: str, size: float) -> None:
    for traffic in _counting.get():
        traffic.add(f"{collective} {axis}", math.ceil(size))


def _group(axis: Axis) -> Any:
    """The process group, looked up by name because operators of compiled code cannot take group objects."""
    return distributed_c10d._resolve_process_group(axis.group)  # type: ignore[arg-type, attr-defined]


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Messages:
    """Messages to and from the ranks of a gloo group, with the `wait` of a `dist.Work`."""

    def __init__(self, works: "Iterable[dist.Work | Transfer | None]") -> None:
        self.works = list(works)

    def wait(self) -> None:
        for work in self.works:
            if work is not None:  # of a group that this process is in
                work.wait()


class Pending:
    """The result of an asynchronous collective."""

    def __init__(self, tensor: Tensor, source: Tensor, work: "dist.Work | Messages | Transfer | None" = None) -> None:
        self.tensor, self.source, self.work = tensor, source, work

    def wait_before(self, x: Tensor) -> Tensor:
        """Wait, then return `x`. For a rank that receives nothing: the compiler drops an exchange without consumers."""
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
    """The sum over the ranks, of the shape of `x`."""
    if torch.compiler.is_compiling():
        summed: Tensor = _all_reduce(x, axis.group, axis.name, axis.size)
        return summed
    _record("all_reduce", axis.name, 2 * (axis.size - 1) / axis.size * _size(x))
    x = x.contiguous()
    if x.is_meta:
        return x
    if x.device.type == "cpu":
        channel = shared_memory.channel(axis.group)
        if channel is not None and x.numel() and _size(x) <= shared_memory.LARGEST:
            return channel.sum(x.view(-1)).view(x.shape)
        if channel is None and axis.size == 2 and _size(x) <= GATHERED_SUM:
            parts, messages = _gather_on_cpu(x, axis)
            messages.wait()
            return parts[0] + parts[1]
    total = x.clone()
    dist.all_reduce(total, group=_group(axis))
    return total


def gather(x: Tensor, axis: Axis) -> Pending:
    """All-gather: `[...]`, of the same shape on all ranks -> `[ranks, ...]`."""
    if torch.compiler.is_compiling():
        return Pending(_gather(x, axis.group, axis.name, axis.size), x)
    _record("all_gather", axis.name, (axis.size - 1) * _size(x))
    x = x.contiguous()
    if x.device.type == "cpu":
        gathered, arriving = _gather_on_cpu(x, axis)
        return Pending(gathered, x, arriving)
    gathered = x.new_empty((axis.size, *x.shape))
    if x.is_meta:
        return Pending(gathered, x)
    group = _group(axis)
    work = dist.all_gather_into_tensor(gathered.view(-1), x.view(-1), group=group, async_op=True)
    return Pending(gathered, x, work)


def _gather_on_cpu(x: Tensor, axis: Axis) -> "tuple[Tensor, Messages | Transfer]":
    """The result of an all-gather `[ranks, ...]` and the messages that fill it.

    Gloo's own all-gather copies everything once more, in threads whose memory is not returned, and takes longer.
    """
    gathered = x.new_empty((axis.size, *x.shape))
    if not x.numel():
        return gathered, Messages(())
    channel = shared_memory.channel(axis.group)
    if channel is not None and _size(x) <= shared_memory.LARGEST:
        return gathered, channel.gather(x.view(-1), gathered.view(axis.size, -1))
    group = _group(axis)
    index = group.rank()
    gathered[index] = x
    works: list[dist.Work | None] = []
    for other in ((index + step) % axis.size for step in range(1, axis.size)):
        works.append(dist.isend(x, group=group, group_dst=other))
        works.append(dist.irecv(gathered[other], group=group, group_src=other))
    return gathered, Messages(works)


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Pending:
    """All-to-all of a flat tensor: `sent[r]` consecutive elements go to rank r, which sends `received[r]` elements."""
    if torch.compiler.is_compiling():
        return Pending(_exchange(x, list(sent), list(received), axis.group, axis.name, axis.index), x)
    _record("all_to_all", axis.name, (sum(sent) - sent[axis.index]) * x.element_size())
    arriving = x.new_empty(sum(received))
    if x.is_meta:
        return Pending(arriving, x)
    if (channel := shared_memory.channel(axis.group)) is not None:
        parts, places = torch.split(x.detach().contiguous(), list(sent)), torch.split(arriving, list(received))
        return Pending(arriving, x, _exchange_on_cpu(parts, places, axis, channel))
    group = _group(axis)
    work = dist.all_to_all_single(arriving, x, list(received), list(sent), group=group, async_op=True)
    return Pending(arriving, x, work)


def _exchange_on_cpu(sent: Sequence[Tensor], received: Sequence[Tensor], axis: Axis, channel: Channel) -> Messages:
    """The messages of an all-to-all of flat tensors, one to and one from each rank; large ones are gloo's."""
    received[channel.index].copy_(sent[channel.index])
    works: list[dist.Work | Transfer | None] = [channel.exchange(_small(sent), _small(received))]
    for rank in channel.sockets:
        if _size(sent[rank]) > shared_memory.LARGEST:
            works.append(dist.isend(sent[rank], group=_group(axis), group_dst=rank))
        if _size(received[rank]) > shared_memory.LARGEST:
            works.append(dist.irecv(received[rank], group=_group(axis), group_src=rank))
    return Messages(works)


def _small(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts that are no larger than a message through shared memory; the others without their numbers."""
    return [part if _size(part) <= shared_memory.LARGEST else part[:0] for part in parts]


def start_gather_along(x: Tensor, dim: int, lengths: Sequence[int], axis: Axis) -> Pending:
    """Start an all-gather of shards of unequal length along `dim`; the shard of rank r has `lengths[r]`."""
    longest = max(lengths)
    x = x.movedim(dim, 0)
    return gather(F.pad(x, (0, 0) * (x.ndim - 1) + (0, longest - len(x))) if len(x) < longest else x, axis)


def finish_gather_along(gathered: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
    """Concatenate along `dim` the padded shards that `start_gather_along` gathered."""
    whole = torch.cat([shard[:length] for shard, length in zip(gathered, lengths, strict=True)])
    return whole.movedim(0, dim)


def gather_along(x: Tensor, dim: int, lengths: Sequence[int], axis: Axis) -> Tensor:
    """Concatenate the shards of all ranks along `dim`; the shard of rank r has `lengths[r]`."""
    return finish_gather_along(start_gather_along(x, dim, lengths, axis).wait(), dim, lengths)


# The same collectives as custom operators for compiled code. They wait only in `_arrived`, which also takes the source
# so that it is kept alive until then; inductor_lowering.py keeps them in program order. A started collective is looked
# up by the address of its output.
_started: dict[int, "dist.Work | Messages | Transfer"] = {}


def _start(pending: Pending) -> Tensor:
    if pending.work is not None and pending.tensor.numel():
        _started[pending.tensor.data_ptr()] = pending.work
    elif pending.work is not None:  # an empty output has no address to look it up by
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
