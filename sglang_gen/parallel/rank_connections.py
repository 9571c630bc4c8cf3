"""Connects the ranks of a group on one machine: sockets, and memory that all of them map (Linux).

Each rank listens at an address in the abstract namespace of Unix sockets and tells the others through gloo. What a rank
writes is a file in memory, whose descriptor it sends over the sockets, so nothing is left on disk.
"""

import hashlib
import hmac
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sglang_gen import log
from sglang_gen.parallel import shared_memory
from sglang_gen.parallel.shared_memory import LARGEST, SLOTS, Channel

CONNECTION_PATIENCE = 10.0  # seconds until a connection to ranks that answered a moment ago fails
DIGEST, ADDRESS = 16, 8  # bytes of a machine's digest or a secret, and of an address


@dataclass(frozen=True)
class Offer:
    """What a rank tells the others of its group: its machine, the address of its socket, and a secret.

    Any process of the machine can connect to the address; only ranks know the secret.
    """

    machine: bytes
    secret: bytes
    address: bytes

    def to_bytes(self) -> bytes:
        return self.machine + self.secret + self.address.ljust(ADDRESS, b"\0")


def _from_bytes(content: bytes) -> Offer:
    """An offer that arrived. Its address begins with a zero byte and has no other."""
    return Offer(content[:DIGEST], content[DIGEST : 2 * DIGEST], b"\0" + content[2 * DIGEST :].strip(b"\0"))


def connect(group: Any, seconds: float) -> None:
    """Open a channel between the ranks of a gloo group if all of them can. Collective.

    `seconds` is the longest wait for a message.
    """
    with ExitStack() as ending:
        listening = _listening_socket(ending)
        own = _offer(listening)
        sent = torch.frombuffer(bytearray(own.to_bytes()), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(group.size())]
        dist.all_gather(received, sent, group=group)
        offers = [_from_bytes(each.numpy().tobytes()) for each in received]
        opened = None
        if listening is not None and all(offer.machine == own.machine for offer in offers):
            opened = _open(group.rank(), offers, listening, seconds)
        can = torch.tensor([opened is not None], dtype=torch.uint8, device="cpu")
        dist.all_reduce(can, dist.ReduceOp.MIN, group=group)
    if opened is not None and can:
        shared_memory.add(group.group_name, opened)
        return
    log.debug(f"The {group.size()} ranks of a group do not share memory, so they send by gloo")
    if opened is not None:
        opened.close()


def _listening_socket(ending: ExitStack) -> socket.socket | None:
    """A socket at an address that the kernel chooses, in the abstract namespace, which has no files."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        listening = ending.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listening.bind("")
        listening.listen()
    except OSError:
        return None
    return listening


def _offer(listening: socket.socket | None) -> Offer:
    """What this rank offers; a machine like no other rank's if it has no socket or cannot name its machine."""
    secret = os.urandom(DIGEST)
    with suppress(OSError):
        if listening is not None:
            boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
            network = str(os.stat("/proc/self/ns/net").st_ino).encode()  # whose processes can reach the address
            return Offer(hashlib.sha256(boot + network).digest()[:DIGEST], secret, listening.getsockname())
    return Offer(os.urandom(DIGEST), secret, b"\0")


def _open(index: int, offers: Sequence[Offer], listening: socket.socket, seconds: float) -> Channel | None:
    """Connect to the ranks before this one, accept those after it, and map their memory; None if one is missing."""
    end = time.monotonic() + CONNECTION_PATIENCE
    sockets: dict[int, socket.socket] = {}
    files: dict[int, int] = {}
    try:
        files[index] = os.memfd_create("sglang_gen")
        os.ftruncate(files[index], SLOTS * len(offers) * LARGEST)  # takes memory only where something is written
        for rank in range(index):
            sockets[rank] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sockets[rank].settimeout(CONNECTION_PATIENCE)
            sockets[rank].connect(offers[rank].address)
            sockets[rank].sendall(offers[rank].secret + bytes([index]))
        while len(sockets) < len(offers) - 1:
            rank, connection = _accepted(listening, offers[index].secret, end)
            if rank in range(index + 1, len(offers)) and rank not in sockets:
                sockets[rank] = connection
            else:
                connection.close()
        for connection in sockets.values():
            socket.send_fds(connection, [b"\0"], [files[index]])
        for rank, connection in sockets.items():
            files[rank] = socket.recv_fds(connection, 1, 1)[1][0]
            connection.setblocking(True)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit(seconds))
        memory = [_mapped(files[rank], len(offers)) for rank in range(len(offers))]
    except (OSError, IndexError):  # IndexError: a rank that ended has sent nothing
        for connection in sockets.values():
            connection.close()
        return None
    finally:
        for file in files.values():  # mappings have descriptors of their own
            os.close(file)
    return Channel(index, sockets, memory)


def _accepted(listening: socket.socket, secret: bytes, end: float) -> tuple[int, socket.socket]:
    """A rank that connects, and its connection; -1 for a process that does not know the secret or does not speak.

    Raises OSError if nothing connects until `end` (`time.monotonic`).
    """
    listening.settimeout(max(end - time.monotonic(), 0.001))
    connection, _ = listening.accept()
    connection.settimeout(max(end - time.monotonic(), 0.001))
    said = b""
    with suppress(OSError):
        said = connection.recv(len(secret) + 1, socket.MSG_WAITALL)
    is_rank = len(said) == len(secret) + 1 and hmac.compare_digest(said[:-1], secret)
    return said[-1] if is_rank else -1, connection


def limit(seconds: float) -> bytes:
    """The time that a socket waits, as the kernel takes it; 0 would be without end."""
    return struct.pack("ll", int(seconds), max(int(seconds % 1 * 1e6), 1))


def _mapped(file: int, ranks: int) -> Tensor:
    memory = mmap.mmap(file, SLOTS * ranks * LARGEST)
    return torch.frombuffer(memory, dtype=torch.uint8).view(SLOTS, ranks, LARGEST)
