"""The ranks of a run as a mesh with the axes dp, cfg, ring, ulysses, tp, outermost first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sglang_gen.errors import LostError, RunError, first_line
from sglang_gen.parallel.collectives import Axis
from sglang_gen.types import Layout

AXES = ("dp", "cfg", "ring", "ulysses", "tp")
SEQUENCE = "sp"  # ring and ulysses as one axis
REMOTE = ("emote", "onnection", "closed")  # words of NCCL where another rank is gone
LOCAL_AXES = (
    "Unable to find",
    "Unable to resolve",
    "unsupported gloo device",
)  # words of gloo where no other rank is asked
SHARED = "Duplicate GPU"  # words of NCCL where two ranks are to compute on one
TIMEOUT = 30.0  # minutes after which a collective that waits for a rank fails


@dataclass(frozen=True)
class Mesh:
    """One rank's view: where it stands on each axis, and its process group along each axis longer than one."""

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    groups: Mapping[str, Any] = field(default_factory=dict)

    def size(self, axis: str) -> int:
        return int(getattr(self.layout, axis))

    def index(self, axis: str) -> int:
        """This rank's coordinate on `axis`."""
        return coordinates(self.layout, self.rank)[axis]

    def axis(self, name: str) -> Axis:
        """One axis of the mesh, or "sp": ring and ulysses as one, of which ring is the outer."""
        group = self.groups[name].group_name if name in self.groups else ""
        if name != SEQUENCE:
            return Axis(name, self.size(name), self.index(name), group)
        ulysses = self.size("ulysses")
        index = self.index("ring") * ulysses + self.index("ulysses")
        return Axis(name, self.size("ring") * ulysses, index, group)

    @property
    def leads(self) -> bool:
        """True on the one rank of each data parallel group that decodes."""
        return all(self.index(axis) == 0 for axis in AXES if axis != "dp")

    def meet(self) -> None:
        """Wait until every rank is here, so that none is timed while it waits for another's start."""
        if self.layout.ranks > 1:
            dist.barrier()

    def share(self, item: Any) -> Any:
        """The picklable `item` of rank 0, on every rank."""
        if self.layout.ranks == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]

    def least(self, number: int | None) -> int | None:
        """The smallest of all ranks' numbers, so that all decide alike; None where there are none."""
        found = self.gather_all(number)
        least: int | None = self.share(min(found) if found and number is not None else None)
        return least

    def gather(self, item: Any, axis: str) -> list[Any] | None:
        """The picklable `item` of every rank along `axis`, in order, on the first of them; None on the others."""
        if axis not in self.groups:
            return [item]
        first = self.index(axis) == 0
        found: list[Any] | None = [None] * self.size(axis) if first else None
        dist.gather_object(item, found, group=self.groups[axis], group_dst=0)
        return found

    def gather_all(self, item: Any) -> list[Any] | None:
        """The picklable `item` of every rank, on rank 0; None on the others."""
        if self.layout.ranks == 1:
            return [item]
        found: list[Any] | None = [None] * self.layout.ranks if self.rank == 0 else None
        dist.gather_object(item, found, dst=0)
        return found


def coordinates(layout: Layout, rank: int) -> dict[str, int]:
    """Where a rank stands on each axis; the last axis varies fastest."""
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, getattr(layout, axis))
    return {axis: found[axis] for axis in AXES}


def members(layout: Layout, axis: str) -> list[list[int]]:
    """The groups of ranks that differ on `axis` alone, each in the order of the axis; "sp" is ring and ulysses."""
    within = ("ring", "ulysses") if axis == SEQUENCE else (axis,)
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.ranks):
        place = coordinates(layout, rank)
        found.setdefault(tuple(place[name] for name in AXES if name not in within), []).append(rank)
    return list(found.values())


def join(layout: Layout, rank: int, port: int, device: str, minutes: float = TIMEOUT) -> Mesh:
    """Meet the other ranks at the launcher's store and build the groups. Collective: every rank calls it."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return form(layout, rank, store, device, minutes)


def use_gpu(index: int) -> None:
    """Compute on this GPU of the machine, or on the only one that the launcher lets this process see.

    Raises RunError where it has none of that number.
    """
    count = torch.cuda.device_count()
    if index >= count != 1:
        raise RunError(f"torch sees {count} GPUs here, none for local rank {index}; lower --nproc-per-node")
    torch.cuda.set_device(index if count > 1 else 0)


def form(layout: Layout, rank: int, store: Any, device: str, minutes: float) -> Mesh:
    """Meet the other ranks at a store and build the groups. Collective: every rank calls it."""
    timeout = timedelta(minutes=minutes)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.ranks, timeout=timeout)
    groups = {}
    for axis in (*AXES, SEQUENCE):
        if len(members(layout, axis)) == layout.ranks:
            continue  # every rank is alone
        for ranks in members(layout, axis):
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                groups[axis] = group
    if device == "cuda":
        _connect(groups)
    return Mesh(layout, rank, groups)


def _connect(groups: Mapping[str, Any]) -> None:
    """Let NCCL build its connections, which takes seconds, before anything is timed and before memory is shared out."""
    for group in (None, *groups.values()):  # the first is that of all ranks
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
        sent = torch.zeros(dist.get_world_size(group), device="cuda")  # each pair has a connection of its own
        dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
    torch.cuda.synchronize()


@contextmanager
def explained(who: str, minutes: float) -> Iterator[None]:
    """Inside, a collective that failed is said in one sentence of which `who` is the subject.

    Raises LostError where another rank is gone, RunError where it did not answer for `minutes`.
    """
    try:
        yield
    except RuntimeError as error:
        found: BaseException | None = error
        while found is not None:  # whoever caught it first may have raised an error of its own
            text = str(found)
            if isinstance(found, dist.DistError) or "gloo/" in text:
                if "imed out" in text or "timeout" in text:
                    raise RunError(
                        f"{who} waited {minutes:g} minutes for another rank and gave up; parallel.timeout_minutes=... "
                        "gives it more time"
                    ) from error
                if SHARED in text:
                    raise RunError(
                        f"{who} has the same GPU as another rank, which NCCL refuses; start one process for each GPU"
                    ) from error
                if any(word in text for word in LOCAL_AXES):
                    raise RunError(f"{who} cannot open connections to other ranks: {_plain(text)}") from error
                if "NCCL" in text and not any(word in text for word in REMOTE):
                    raise RunError(f"{who} failed in NCCL: {text.rpartition('Last error:')[2].strip()}") from error
                raise LostError(f"{who} lost the connection to another rank") from error
            found = found.__cause__ or found.__context__
        raise


def _plain(text: str) -> str:
    """A message of gloo without the place in its source."""
    return first_line(ValueError(text)).rpartition("] ")[2]


def leave() -> None:
    """End what `join` or `form` began, if it came that far."""
    if dist.is_initialized():
        dist.destroy_process_group()
