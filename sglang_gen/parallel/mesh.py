"""The device mesh of a run, with the axes dp, cfg, ring, ulysses and tp from the outermost to the innermost."""

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sglang_gen.errors import LostError, RunError
from sglang_gen.parallel import rank_connections, shared_memory
from sglang_gen.parallel.collectives import Axis
from sglang_gen.types import Layout

AXES = ("dp", "cfg", "ring", "ulysses", "tp")
SEQUENCE = "sp"  # ring and ulysses combined into one axis
REMOTE = ("emote", "onnection", "closed")  # in NCCL messages if another rank has exited
LOCAL_AXES = (
    "Unable to find",
    "Unable to resolve",
    "unsupported gloo device",
)  # in gloo messages about this rank's own network interfaces
SHARED = "Duplicate GPU"  # in NCCL messages if two ranks use the same GPU
TIMEOUT = 30.0  # minutes until a collective that waits for another rank fails


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the mesh, with its process group along each axis of size two or more."""

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    groups: Mapping[str, Any] = field(default_factory=dict)

    def size(self, axis: str) -> int:
        return int(getattr(self.layout, axis))

    def index(self, axis: str) -> int:
        """This rank's coordinate on `axis`."""
        return coordinates(self.layout, self.rank)[axis]

    def axis(self, name: str) -> Axis:
        """One axis of the mesh, or "sp": ring (outer) and ulysses (inner) combined."""
        group = self.groups[name].group_name if name in self.groups else ""
        if name != SEQUENCE:
            return Axis(name, self.size(name), self.index(name), group)
        ulysses = self.size("ulysses")
        index = self.index("ring") * ulysses + self.index("ulysses")
        return Axis(name, self.size("ring") * ulysses, index, group)

    @property
    def leads(self) -> bool:
        """True on the rank of each data parallel group that decodes."""
        return all(self.index(axis) == 0 for axis in AXES if axis != "dp")

    def barrier(self) -> None:
        """Wait for all ranks, so that no rank's timing includes the start of another."""
        if self.layout.ranks > 1:
            dist.barrier()

    def broadcast(self, item: Any) -> Any:
        """Rank 0's `item`, which JSON can represent, on every rank. Collective."""
        if self.layout.ranks == 1:
            return item
        size = torch.tensor([0], device="cpu")
        text = _as_bytes(json.dumps(item).encode() if self.rank == 0 else b"")
        size[0] = len(text)
        dist.broadcast(size, src=0)
        text = text if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device="cpu")
        dist.broadcast(text, src=0)
        return json.loads(_content(text))

    def minimum(self, number: int | None) -> int | None:
        """The minimum over all ranks, so that all make the same decision; None if `number` is None. Collective."""
        numbers = self.gather_all(number)
        least: int | None = self.broadcast(min(numbers) if numbers and number is not None else None)
        return least

    def gather(self, data: bytes, axis: str) -> list[bytes] | None:
        """The `data` of every rank along `axis`, in order, on the first of them; None on the others. Collective."""
        if axis not in self.groups:
            return [data]
        return _gather(data, self.size(axis), self.index(axis), self.groups[axis])

    def gather_all(self, item: Any) -> list[Any] | None:
        """The `item` of every rank, which JSON can represent, on rank 0; None on the others. Collective."""
        if self.layout.ranks == 1:
            return [item]
        gathered = _gather(json.dumps(item).encode(), self.layout.ranks, self.rank, None)
        return None if gathered is None else [json.loads(text) for text in gathered]


# torch's collectives of objects unpickle what arrives, which runs code; only bytes of known formats travel here.
def _gather(data: bytes, count: int, index: int, group: Any) -> list[bytes] | None:
    """The `data` of all ranks of a group, in order, on its first rank; None on the others. Collective."""
    sizes = [torch.tensor([0], device="cpu") for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(data)], device="cpu"), group=group)
    longest = max(map(int, sizes))
    padded = _as_bytes(data.ljust(longest, b"\0"))
    received = [torch.empty_like(padded) for _ in range(count)] if index == 0 else None
    dist.gather(padded, received, group=group, group_dst=0)
    if received is None:
        return None
    return [_content(text[: int(size)]) for text, size in zip(received, sizes, strict=True)]


def _as_bytes(data: bytes) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )


def _content(text: torch.Tensor) -> bytes:
    return text.numpy().tobytes()


def coordinates(layout: Layout, rank: int) -> dict[str, int]:
    """A rank's coordinate on each axis; the last axis varies fastest."""
    place = {}
    for axis in reversed(AXES):
        rank, place[axis] = divmod(rank, getattr(layout, axis))
    return {axis: place[axis] for axis in AXES}


def members(layout: Layout, axis: str) -> list[list[int]]:
    """Groups of ranks that differ only on `axis`, each in the order of the axis; "sp" is ring and ulysses combined."""
    within = ("ring", "ulysses") if axis == SEQUENCE else (axis,)
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.ranks):
        place = coordinates(layout, rank)
        groups.setdefault(tuple(place[name] for name in AXES if name not in within), []).append(rank)
    return list(groups.values())


def local_store() -> Any:
    """A store for the ranks of this machine. It listens on 127.0.0.1 only; torch's own socket would on all addresses.

    Whoever reaches the store can redirect the ranks' connections.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        return dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def join(layout: Layout, rank: int, port: int, device: str, minutes: float = TIMEOUT) -> Mesh:
    """Connect to the other ranks through the launcher's store and create the process groups. Collective."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return form(layout, rank, store, device, minutes)


def use_gpu(index: int) -> None:
    """Select the GPU with this index, or the only GPU that is visible to this process.

    Raises RunError if there is no such GPU.
    """
    count = torch.cuda.device_count()
    if index >= count != 1:
        raise RunError(f"torch sees {count} GPUs here, none for local rank {index}; lower --nproc-per-node")
    torch.cuda.set_device(index if count > 1 else 0)


def form(layout: Layout, rank: int, store: Any, device: str, minutes: float) -> Mesh:
    """Connect to the other ranks through a store and create the process groups. Collective."""
    timeout = timedelta(minutes=minutes)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.ranks, timeout=timeout)
    groups = {}
    for axis in (*AXES, SEQUENCE):
        if len(members(layout, axis)) == layout.ranks:
            continue  # groups of one rank
        for ranks in members(layout, axis):
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                groups[axis] = group
    if device == "cuda":
        _connect(groups)
    else:
        for group in groups.values():
            rank_connections.connect(group, timeout.total_seconds())
    return Mesh(layout, rank, groups)


def _connect(groups: Mapping[str, Any]) -> None:
    """Let NCCL open its connections, which takes seconds, before anything is timed and before memory is planned."""
    for group in (None, *groups.values()):  # None is the group of all ranks
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
        sent = torch.zeros(dist.get_world_size(group), device="cuda")  # opens a connection between each pair
        dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
    torch.cuda.synchronize()


@contextmanager
def explained(who: str, minutes: float) -> Iterator[None]:
    """Turn the failure of a collective inside the context into an error of one sentence, with the subject `who`.

    Raises LostError if another rank has exited, RunError if it did not answer for `minutes` or this rank failed itself.
    """
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None:  # a caller may have replaced the original error by its own
            text = str(cause)
            if isinstance(cause, dist.DistError) or "gloo/" in text:
                if "imed out" in text or "timeout" in text:
                    raise RunError(
                        f"{who} waited {minutes:g} minutes for another rank; raise parallel.timeout_minutes to wait "
                        "longer"
                    ) from error
                if SHARED in text:
                    raise RunError(
                        f"{who} has the same GPU as another rank, which NCCL refuses; start one process for each GPU"
                    ) from error
                if any(word in text for word in LOCAL_AXES):
                    raise RunError(
                        f"{who} cannot open connections to other ranks (--log-level debug shows why)"
                    ) from error
                if "NCCL" in text and not any(word in text for word in REMOTE):
                    raise RunError(f"{who} failed in NCCL (--log-level debug shows why)") from error
                raise LostError(f"{who} lost the connection to another rank") from error
            cause = cause.__cause__ or cause.__context__
        raise


def leave() -> None:
    """Destroy the process groups, if `join` or `form` created them, and close what their ranks share."""
    shared_memory.disconnect()
    if dist.is_initialized():
        dist.destroy_process_group()
