"""Collectives of ranks on one machine, which send through shared memory: the same results as gloo's, in any order."""

import mmap
import random
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from sglang_gen.errors import LostError, RunError
from sglang_gen.parallel import mesh, rank_connections, shared_memory
from sglang_gen.parallel.collectives import Axis, all_reduce, exchange, gather
from sglang_gen.parallel.rank_connections import Offer
from sglang_gen.parallel.shared_memory import LARGEST, SLOTS, UNFINISHED, Channel
from sglang_gen.types import Layout

ACCEPTED = rank_connections._accepted
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator)).abs().to(dtype)


@contextmanager
def without_channel(axis: Axis):
    """The group's collectives are gloo's."""
    channel = shared_memory._channels.pop(axis.group)
    try:
        yield
    finally:
        shared_memory._channels[axis.group] = channel


def collectives(joined: mesh.Mesh, largest: int) -> list[tuple[str, bool]]:
    """Whether each collective gives what it gives without shared memory; messages above `largest` bytes are gloo's."""
    axis, found = joined.axis("tp"), []
    shared_memory.LARGEST = largest
    try:
        for dtype in DTYPES:
            for shape in ((), (3,), (0,), (2, 5, 7), (64, 33)):
                x = drawn(shape, dtype, axis.index)
                y = gather(x, axis).wait()
                z = all_reduce(x, axis) if dtype not in (torch.bool, torch.bfloat16) else x
                with without_channel(axis):
                    equal = torch.equal(y, gather(x, axis).wait())
                    expected = all_reduce(x, axis) if z is not x else x
                found.append((f"gather {dtype} {shape}", equal and y.dtype == dtype))
                close = torch.allclose(z, expected, rtol=1e-6) if z.is_floating_point() else torch.equal(z, expected)
                found.append((f"sum {dtype} {shape}", close and z.dtype == dtype))
            counts = [[(3 * sender + 5 * taker) % 7 * 9 for taker in range(axis.size)] for sender in range(axis.size)]
            sent, received = counts[axis.index], [row[axis.index] for row in counts]
            x = drawn((sum(sent),), dtype, axis.index)
            y = exchange(x, sent, received, axis).wait()
            with without_channel(axis):
                found.append((f"exchange {dtype}", torch.equal(y, exchange(x, sent, received, axis).wait())))
        assert shared_memory.channel(axis.group).started
    finally:
        shared_memory.LARGEST = LARGEST
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("largest", [LARGEST, 100])  # 100: some messages of an exchange are gloo's and some are not
def test_collectives_are_those_of_gloo(ranks, size, largest):
    for found in ranks.run(Layout(tp=size), collectives, largest):
        assert [name for name, equal in found if not equal] == []
        assert len(found) == len(DTYPES) * 11


def sums(joined: mesh.Mesh, dtype: torch.dtype) -> torch.Tensor:
    axis = joined.axis("tp")
    return all_reduce(drawn((1000,), dtype, axis.index), axis)


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_have_the_same_sum_rounded_once(ranks, size):
    found = ranks.run(Layout(tp=size), sums, torch.bfloat16)
    exact = sum(drawn((1000,), torch.bfloat16, rank).double() for rank in range(size))
    assert all(torch.equal(each, exact.bfloat16()) for each in found)


def slow_reader(joined: mesh.Mesh, behind: int) -> list[torch.Tensor]:
    """One rank starts as many operations as it may and reads nothing, while the others go on as far as they can."""
    axis = joined.axis("tp")
    pending = [gather(torch.full((4,), 10 * step + axis.index), axis) for step in range(UNFINISHED)]
    if axis.index == behind:
        time.sleep(0.3)
    pending += [gather(torch.full((4,), 10 * step + axis.index), axis) for step in range(UNFINISHED, 4 * SLOTS)]
    return [each.wait() for each in reversed(pending)][::-1]


@pytest.mark.parametrize("behind", [0, 1])
def test_memory_is_not_written_before_the_slowest_rank_has_read_it(ranks, behind):
    for found in ranks.run(Layout(tp=2), slow_reader, behind):
        expected = [[[10 * step + rank] * 4 for rank in range(2)] for step in range(4 * SLOTS)]
        assert [each.tolist() for each in found] == expected


def in_disorder(joined: mesh.Mesh) -> bool:
    """Random collectives along two axes, of which each rank waits for some at another time."""
    same, own = random.Random(1), random.Random(joined.rank)
    right, waiting = True, []
    for step in range(150):
        axis = joined.axis(same.choice(["tp", "ring"]))
        count = same.choice([1, 3, 2000])
        if own.random() < 0.1:
            time.sleep(own.random() / 100)
        if same.random() < 0.5:
            expected = torch.stack([torch.full((count,), 100 * step + index) for index in range(axis.size)])
            waiting.append((gather(torch.full((count,), 100 * step + axis.index), axis), expected))
        else:
            parts = [torch.full((count,), 100 * step + 10 * axis.index + taker) for taker in range(axis.size)]
            expected = torch.cat([torch.full((count,), 100 * step + 10 * n + axis.index) for n in range(axis.size)])
            counts = [count] * axis.size
            waiting.append((exchange(torch.cat(parts), counts, counts, axis), expected))
        while waiting and own.random() < 0.5:
            pending, expected = waiting.pop(own.randrange(len(waiting)))
            right &= torch.equal(pending.wait(), expected)
    return right and all(torch.equal(pending.wait(), expected) for pending, expected in waiting)


def test_ranks_may_wait_in_any_order_and_at_any_time(ranks):
    assert ranks.run(Layout(tp=2, ring=2), in_disorder) == [True] * 4


def connected_anew(joined: mesh.Mesh, on_one: str) -> tuple[bool, list[int]]:
    """Whether there is a channel after `on_one` has happened on one rank, and what a gather gives then."""
    axis, group = joined.axis("tp"), joined.groups["tp"]
    kept = shared_memory._channels.pop(axis.group)
    with ExitStack() as changed:
        changed.enter_context(patch.object(rank_connections, "CONNECTION_PATIENCE", 0.5))
        if axis.index == 1:
            changed.enter_context(broken(on_one, rank_connections._offer))
        rank_connections.connect(group, 60.0)
        opened = shared_memory.channel(axis.group)
        try:
            return opened is not None, gather(torch.tensor([axis.index]), axis).wait().flatten().tolist()
        finally:
            if opened is not None:
                opened.close()
            shared_memory.add(axis.group, kept)


def broken(how: str, offer: Callable[..., Offer]) -> AbstractContextManager[object]:
    """On this rank the connection fails in such a way."""
    failing = {"no memory": (mmap, "mmap"), "no name of the machine": (Path, "read_bytes")}
    if how in failing:
        return patch.object(*failing[how], side_effect=OSError)
    if how == "no Linux":
        return patch.object(rank_connections, "_listening_socket", lambda _: None)
    if how == "another machine":
        return patch.object(rank_connections, "_offer", lambda listening: replace(offer(listening), machine=bytes(16)))
    if how == "another secret":  # a rank that connects to it does not know the right one
        return patch.object(
            rank_connections, "_accepted", lambda listening, _, end: ACCEPTED(listening, b"?" * 16, end)
        )
    if how == "silence":
        return patch.object(rank_connections.socket.socket, "connect", lambda *_: time.sleep(1))
    return nullcontext()


@pytest.mark.parametrize(
    "on_one", ["", "another machine", "no memory", "no name of the machine", "no Linux", "silence"]
)
def test_a_group_has_a_channel_only_if_each_of_its_ranks_can(ranks, on_one):
    for size in (2, 3):
        found = ranks.run(Layout(tp=size), connected_anew, on_one)
        assert found == [(not on_one, list(range(size)))] * size


def test_a_rank_that_does_not_know_the_secret_is_not_connected(ranks):
    found = ranks.run(Layout(tp=3), connected_anew, "another secret")
    assert found == [(False, [0, 1, 2])] * 3


@pytest.mark.parametrize("said", [b"", b"?", b"?" * 16 + b"\1", b"s" * 16 + b"\1"])
def test_a_process_that_connects_is_a_rank_if_it_knows_the_secret(said):
    with ExitStack() as ending:
        listening = rank_connections._listening_socket(ending)
        connection = ending.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.connect(listening.getsockname())
        connection.sendall(said)
        started = time.monotonic()
        rank, accepted = rank_connections._accepted(listening, b"s" * 16, started + 0.2)
        accepted.close()
        assert rank == (1 if said.startswith(b"s") else -1)
        assert time.monotonic() - started < 2  # a process that says nothing is not waited for


@pytest.fixture
def pair():
    """The channel of one of two ranks, and the other end of its socket."""
    ours, theirs = socket.socketpair()
    yield Channel(0, {1: ours}, [torch.zeros(SLOTS, 2, 64, dtype=torch.uint8)] * 2), theirs
    ours.close()
    theirs.close()


def gathered(channel: Channel) -> torch.Tensor:
    found = torch.empty(2, 3)
    channel.gather(torch.ones(3), found).wait()
    return found


def test_a_rank_whose_other_rank_has_ended_says_so(pair):
    channel, theirs = pair
    transfer = channel.gather(torch.ones(3), torch.empty(2, 3))
    theirs.close()
    with pytest.raises(LostError, match="Rank 0 lost the connection to another rank"), mesh.explained("Rank 0", 1.0):
        transfer.wait()
    with pytest.raises(LostError, match="Rank 0 lost"), mesh.explained("Rank 0", 1.0):
        transfer.wait()
    with pytest.raises(LostError, match="Rank 0 lost"), mesh.explained("Rank 0", 1.0):
        gathered(channel)


def test_a_rank_that_waits_too_long_says_how_to_wait_longer(pair):
    channel, _ = pair
    channel.sockets[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, rank_connections.limit(0.02))
    with pytest.raises(RunError, match=r"waited 0\.5 minutes.*timeout_minutes"), mesh.explained("Rank 0", 0.5):
        gathered(channel)


def test_channels_end_with_the_process_groups(monkeypatch, pair):
    channel, _ = pair
    channel.gather(torch.ones(3), torch.empty(2, 3))
    monkeypatch.setattr(shared_memory, "_channels", {"a group": channel})
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    mesh.leave()
    assert shared_memory.channel("a group") is None
    assert channel.sockets[1].fileno() == -1
    assert not channel.unfinished
