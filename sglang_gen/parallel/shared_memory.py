"""Messages between the ranks of one machine, through shared memory (Linux).

Gloo hands every message to a thread, which may wait for a core while the ranks compute: of the collectives between
products one in five takes 4 ms. Here a rank copies what it sends to memory that the other ranks map, and writes a byte
to a socket, which wakes the rank that waits for it.

All ranks of a group start the same operations in the same order. Before a rank starts operation n, it finishes
operation n - UNFINISHED, which every other rank has started by then. These ranks have finished operation
n - 2 * UNFINISHED, so nobody reads its memory any more, and operation n takes it.
"""

import hashlib
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST = 4 * 2**20  # bytes of a message
UNFINISHED = 3  # operations that a rank has started and not finished
SLOTS = 2 * UNFINISHED
CONNECTION_PATIENCE = 10.0  # seconds until a connection to a rank that answered a moment ago fails
DIGEST, OFFER = 16, 24  # bytes of a digest, and of what a rank tells the others: its machine and its address
Arriving = tuple[int, Tensor | None, Tensor | None]
PEER = "3i"  # process, user and group at the other end of a socket


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
            oldest = self.unfinished.popleft()
            for rank, source, destination in oldest.arriving:
                self._await(rank)
                if source is not None and destination is not None:
                    content = _content(destination)
                    content.copy_(source[: len(content)])
            oldest.finished = True

    def close(self) -> None:
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


def connect(group: Any, seconds: float) -> None:
    """Open a channel between the ranks of a gloo group if all of them can. A message is awaited so long. Collective."""
    listening = _listening_socket()
    offer = torch.frombuffer(bytearray(_offer(listening)), dtype=torch.uint8)
    offers = [torch.empty_like(offer) for _ in range(group.size())]
    dist.all_gather(offers, offer, group=group)
    machines, addresses = zip(*(_parts(each) for each in offers), strict=True)
    opened = None
    if listening is not None:
        with listening:
            if machines.count(machines[0]) == len(machines):
                opened = _open(group.rank(), addresses, listening, seconds)
    can = torch.tensor([opened is not None], dtype=torch.uint8, device="cpu")
    dist.all_reduce(can, dist.ReduceOp.MIN, group=group)
    if opened is not None and can:
        _channels[group.group_name] = opened
    elif opened is not None:
        opened.close()


def disconnect() -> None:
    """Close all channels."""
    while _channels:
        _channels.popitem()[1].close()


def _listening_socket() -> socket.socket | None:
    """A socket at an address that the kernel chooses, in the abstract namespace, which has no files."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind("")
        listening.listen()
        listening.settimeout(CONNECTION_PATIENCE)
    except OSError:
        return None
    return listening


def _offer(listening: socket.socket | None) -> bytes:
    """What the other ranks need: a digest of the machine and its network namespace, and the socket's address."""
    if listening is None:
        return os.urandom(DIGEST).ljust(OFFER, b"\0")  # like no other rank's
    machine = Path("/proc/sys/kernel/random/boot_id").read_bytes() + str(os.stat("/proc/self/ns/net").st_ino).encode()
    address: bytes = listening.getsockname()
    return hashlib.sha256(machine).digest()[:DIGEST] + address.removeprefix(b"\0").ljust(OFFER - DIGEST, b"\0")


def _parts(offer: Tensor) -> tuple[bytes, bytes]:
    content = offer.numpy().tobytes()
    return content[:DIGEST], b"\0" + content[DIGEST:].rstrip(b"\0")


def _open(index: int, addresses: Sequence[bytes], listening: socket.socket, seconds: float) -> Channel | None:
    """Connect to the ranks before this one, accept those behind it, and map their memory; None if something fails."""
    sockets: dict[int, socket.socket] = {}
    files: dict[int, int] = {}
    try:
        files[index] = os.memfd_create("sglang_gen")
        os.ftruncate(files[index], SLOTS * len(addresses) * LARGEST)  # takes memory only where something is written
        for rank in range(index):
            sockets[rank] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sockets[rank].connect(addresses[rank])
            sockets[rank].sendall(bytes([index]))
        while len(sockets) < len(addresses) - 1:
            connection, _ = listening.accept()
            if _has_own_user(connection):
                sockets[connection.recv(1)[0]] = connection
            else:
                connection.close()
        for connection in sockets.values():
            if not _has_own_user(connection):
                raise PermissionError("another user answers at the address of a rank")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit(seconds))
            socket.send_fds(connection, [b"\0"], [files[index]])
        for rank, connection in sockets.items():
            files[rank] = socket.recv_fds(connection, 1, 1)[1][0]
        memory = [_mapped(files[rank], len(addresses)) for rank in range(len(addresses))]
    except (OSError, IndexError):  # IndexError: a rank that ended has sent nothing
        for connection in sockets.values():
            connection.close()
        return None
    finally:
        for file in files.values():  # mappings stay
            os.close(file)
    return Channel(index, sockets, memory)


def limit(seconds: float) -> bytes:
    """The time that a socket waits, as the kernel takes it; 0 would be without end."""
    return struct.pack("ll", int(seconds), max(int(seconds % 1 * 1e6), 1))


def _has_own_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this user: names of sockets have no permissions."""
    content = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(PEER))
    return int(struct.unpack(PEER, content)[1]) == os.getuid()


def _mapped(file: int, ranks: int) -> Tensor:
    memory = mmap.mmap(file, SLOTS * ranks * LARGEST)
    return torch.frombuffer(memory, dtype=torch.uint8).view(SLOTS, ranks, LARGEST)


def _content(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    return x.view(-1).view(torch.uint8)
