"""Messages between the ranks of one machine, through shared memory (Linux).

Gloo hands every message to a thread, which may wait for a core while the ranks compute: of the collectives between
matrix products one in five takes 4 ms. Here a rank copies what it sends to memory that the other ranks map, and writes
a byte to a socket, which wakes the rank that waits for it. `rank_connections.py` opens the sockets and maps the memory.

All ranks of a group start the same operations in the same order. Before a rank starts operation n, it finishes
operation n - UNFINISHED, which every other rank has started by then. These ranks have finished operation
n - 2 * UNFINISHED, so nobody reads its memory any more, and operation n takes it.
"""

import socket
from collections import deque
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST = 4 * 2**20  # bytes of a message
UNFINISHED = 3  # operations that a rank has started and not finished
SLOTS = 2 * UNFINISHED
Arriving = tuple[int, Tensor | None, Tensor | None]  # rank, the memory that it writes, and the tensor for its message


class Channel:
    """One rank's connections to the others of its group: for each of them a socket, and the memory that it writes."""

    def __init__(self, index: int, sockets: Mapping[int, socket.socket], memory: Sequence[Tensor]) -> None:
        """`memory[r]` is `[SLOTS, ranks, LARGEST]` uint8: for each slot the messages of rank r to every rank."""
        self.index, self.sockets, self.memory = index, sockets, memory
        self.started = 0
        self.unfinished: deque[Transfer] = deque()

    def gather(self, x: Tensor, gathered: Tensor) -> "Transfer":
        """Start an all-gather of a flat tensor into `gathered`, `[ranks, numbers]`. Collective."""
        slot = self._next_slot()
        ranks = len(self.memory)  # all read the message to the next rank
        self._write(x, slot, (self.index + 1) % ranks)
        gathered[self.index] = x
        return self._start([(n, self.memory[n][slot, (n + 1) % ranks], gathered[n]) for n in self.sockets])

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a flat tensor over the ranks, added up in the same order on all of them. Collective."""
        slot, ranks = self._next_slot(), len(self.memory)
        self._write(x, slot, (self.index + 1) % ranks)
        self._start([(rank, None, None) for rank in self.sockets]).wait()
        size = x.numel() * x.element_size()
        parts = [memory[slot, (rank + 1) % ranks, :size].view(x.dtype) for rank, memory in enumerate(self.memory)]
        parts[self.index] = x
        return parts[0] + parts[1] if ranks == 2 else torch.stack(parts).sum(dim=0, dtype=x.dtype)

    def exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> "Transfer":
        """Start sending flat tensors, `sent[r]` to rank r, and receiving `received[r]` from rank r. Collective.

        What a rank has for itself is not copied.
        """
        slot = self._next_slot()
        for rank in self.sockets:
            self._write(sent[rank], slot, rank)
        return self._start([(rank, self.memory[rank][slot, self.index], received[rank]) for rank in self.sockets])

    def finish(self, transfer: "Transfer") -> None:
        """Finish operations up to this one."""
        while not transfer.finished:
            oldest = self.unfinished[0]
            for rank, source, destination in oldest.arriving:
                self._await(rank)
                if source is not None and destination is not None:
                    content = _content(destination)
                    content.copy_(source[: len(content)])
            oldest.finished = True
            self.unfinished.popleft()

    def close(self) -> None:
        self.unfinished.clear()
        for connection in self.sockets.values():
            connection.close()

    def _next_slot(self) -> int:
        """The memory of the next operation, once it is free."""
        while len(self.unfinished) >= UNFINISHED:
            self.finish(self.unfinished[0])
        self.started += 1
        return self.started % SLOTS

    def _write(self, x: Tensor, slot: int, place: int) -> None:
        content = _content(x)
        self.memory[self.index][slot, place, : len(content)] = content

    def _start(self, arriving: "list[Arriving]") -> "Transfer":
        for rank, connection in self.sockets.items():
            try:
                connection.send(b"\0")
            except OSError as error:
                raise dist.DistNetworkError(f"The connection to rank {rank} of the group is closed") from error
        transfer = Transfer(self, arriving)
        self.unfinished.append(transfer)
        return transfer

    def _await(self, rank: int) -> None:
        """Wait until the rank has written its next message."""
        try:
            woken = self.sockets[rank].recv(1)
        except BlockingIOError as error:
            raise dist.DistNetworkError(f"Rank {rank} of the group timed out") from error
        except OSError as error:
            raise dist.DistNetworkError(f"The connection to rank {rank} of the group was lost") from error
        if not woken:
            raise dist.DistNetworkError(f"The connection to rank {rank} of the group was closed")


class Transfer:
    """An operation that was started, with the `wait` of a `dist.Work`.

    `arriving` has for every other rank the memory that it writes and the tensor that takes its message, if one does.
    """

    def __init__(self, channel: Channel, arriving: list[Arriving]) -> None:
        self.channel, self.arriving, self.finished = channel, arriving, False

    def wait(self) -> None:
        self.channel.finish(self)


_channels: dict[str, Channel] = {}  # by the name of the group


def channel(group: str) -> Channel | None:
    """The channel of a group; None if its ranks are on several machines, or if there is no shared memory."""
    return _channels.get(group)


def add(group: str, opened: Channel) -> None:
    _channels[group] = opened


def disconnect() -> None:
    """Close all channels."""
    while _channels:
        _channels.popitem()[1].close()


def _content(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    return x.view(-1).view(torch.uint8)
