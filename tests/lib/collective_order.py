"""The collectives that every rank of a layout calls, in order, and whether all of them would complete.

Ranks are traced on the meta device one after the other. `complete` then plays them against each other: a collective
completes when every rank of its group has reached it, as in NCCL, so different orders or sizes show as the hang or the
corruption that they would be.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from sglang_gen.parallel import collectives
from sglang_gen.parallel.mesh import members
from sglang_gen.types import Layout


@dataclass(frozen=True)
class Call:
    """One collective on one rank. `sent` and `received` are elements by rank of an exchange."""

    kind: str
    axis: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()

    def __str__(self) -> str:
        sizes = f"{list(self.sent)} -> {list(self.received)}" if self.kind == "exchange" else str(list(self.shape))
        return f"{self.kind} {self.axis} {sizes} {str(self.dtype).removeprefix('torch.')}"


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The collectives that are called inside the context, in order, by whatever module imported them."""
    calls: list[Call] = []

    def note(kind: str, x: Any, axis: Any, *sizes: Sequence[int]) -> None:
        calls.append(Call(kind, axis.name, tuple(x.shape), x.dtype, *map(tuple, sizes)))

    reduce, gather, exchange = collectives.all_reduce, collectives.gather, collectives.exchange

    def reducing(x: Any, axis: Any) -> Any:
        note("all_reduce", x, axis)
        return reduce(x, axis)

    def gathering(x: Any, axis: Any) -> Any:
        note("gather", x, axis)
        return gather(x, axis)

    def exchanging(x: Any, sent: Any, received: Any, axis: Any) -> Any:
        note("exchange", x, axis, sent, received)
        return exchange(x, sent, received, axis)

    with ExitStack() as stack:
        for original, stand_in in ((reduce, reducing), (gather, gathering), (exchange, exchanging)):
            for place in _places(original):
                stack.enter_context(patch.object(*place, stand_in))
        yield calls


def _places(function: Callable[..., Any]) -> list[tuple[Any, str]]:
    """(module, name) wherever a module of the project refers to a function."""
    modules = [module for name, module in sys.modules.items() if name.startswith("sglang_gen")]
    return [(module, name) for module in modules for name, value in vars(module).items() if value is function]


def complete(layout: Layout, calls: Sequence[Sequence[Call]]) -> int:
    """Let the ranks of a layout call these collectives; the number of them that completed.

    Raises AssertionError for ranks that meet in different collectives, and for ranks that wait for each other forever.
    """
    groups = {
        (axis, rank): tuple(group)
        for axis in ("dp", "cfg", "ring", "ulysses", "tp", "sp")
        for group in members(layout, axis)
        for rank in group
    }
    at, completed = [0] * layout.ranks, 0

    def waiting(rank: int) -> Call | None:
        return calls[rank][at[rank]] if at[rank] < len(calls[rank]) else None

    while any(map(waiting, range(layout.ranks))):
        before = completed
        for rank in range(layout.ranks):
            call = waiting(rank)
            if call is None:
                continue
            group = groups[call.axis, rank]
            met = [waiting(other) for other in group]
            if any(other is None or other.axis != call.axis for other in met):
                continue  # another rank is not there yet
            _check(layout, group, [other for other in met if other is not None], [at[other] for other in group])
            for other in group:
                at[other] += 1
            completed += 1
        if completed == before:
            raise AssertionError(f"{layout} hangs: {_stuck(layout, at, [waiting(r) for r in range(layout.ranks)])}")
    return completed


def _check(layout: Layout, group: tuple[int, ...], met: list[Call], at: list[int]) -> None:
    """The calls of a group at one moment are one collective."""
    place = f"{layout}: ranks {list(group)} at their collectives {at}"
    if len({(call.kind, call.dtype) for call in met}) > 1:
        raise AssertionError(f"{place} call different ones: {'; '.join(map(str, met))}")
    if met[0].kind != "exchange":
        if len({call.shape for call in met}) > 1:
            raise AssertionError(f"{place} call different sizes: {'; '.join(map(str, met))}")
        return
    for sender, call in enumerate(met):
        if sum(call.sent) != torch.Size(call.shape).numel():
            raise AssertionError(f"{place}: rank {group[sender]} sends other than it has: {call}")
        for receiver, other in enumerate(met):
            if call.sent[receiver] != other.received[sender]:
                raise AssertionError(
                    f"{place}: rank {group[sender]} sends {call.sent[receiver]} elements, of which rank "
                    f"{group[receiver]} expects {other.received[sender]}"
                )


def _stuck(layout: Layout, at: list[int], waiting: list[Call | None]) -> str:
    return "; ".join(
        f"rank {rank} {f'waits in collective {at[rank]}, {call}' if call else f'ended after {at[rank]}'}"
        for rank, call in enumerate(waiting)
    )
