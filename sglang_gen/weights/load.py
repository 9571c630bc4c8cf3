"""Checkpoints of diffusers folders into our networks: one tensor after the other, every name accounted for."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sglang_gen.errors import UserError
from sglang_gen.parallel.tensor import Part

Sources = Callable[[str], Sequence[str]]  # our name of a tensor -> the checkpoint's names, joined along dimension 0
Shrink = Callable[[nn.Module], Mapping[str, Part]]  # leaves a rank's part of a network; what of each tensor that is


def whole(network: nn.Module) -> Mapping[str, Part]:
    """Everything is this rank's."""
    return {}


class Tensors(Protocol):
    """Tensors by name, each of which is read once."""

    def names(self) -> Set[str]: ...

    def shape(self, name: str) -> Sequence[int]: ...

    def take(self, name: str) -> Tensor: ...


def load(
    build: Callable[[], nn.Module],
    files: Sequence[Path],
    sources: Sources,
    dtype: torch.dtype,
    device: str,
    shrink: Shrink = whole,
) -> nn.Module:
    """A network out of safetensors files, tensor by tensor; see `fill`."""
    with ExitStack() as stack:
        checkpoint = Checkpoint([stack.enter_context(safe_open(file, framework="pt")) for file in files])
        return fill(build, checkpoint, sources, dtype, device, where(files), shrink)


def fill(
    build: Callable[[], nn.Module],
    tensors: Tensors,
    sources: Sources,
    dtype: torch.dtype,
    device: str,
    where: str,
    shrink: Shrink = whole,
) -> nn.Module:
    """A network that is built on meta and filled tensor by tensor, so that its weights are in memory once.

    `shrink` leaves of the network what this rank has of it, and of each tensor only that part is read. `where` says in
    errors what the tensors are of. Raises UserError naming tensors that are missing, that nothing takes, or whose shape
    is another.
    """
    with torch.device("meta"):
        network = build()
    _check_names(network, tensors.names(), sources, where)
    slots = network.state_dict()
    for name, slot in slots.items():
        _check_shape([_as_linear(tensors.shape(source), slot) for source in sources(name)], slot, sources(name), where)
    parts = shrink(network)
    for name, slot in network.state_dict().items():
        rows = _read(tensors, sources(name), parts.get(name))
        if name not in parts and len(rows) == 1:
            _assign(network, name, rows[0][0].to(device, dtype).view(slot.shape))
        else:
            _assign(network, name, _joined(rows, slot, dtype, device))
    return network.eval()


def _read(tensors: Tensors, names: Sequence[str], part: Part | None) -> list[list[Tensor]]:
    """What stands one below the other in our tensor: pieces of the tensors of these names, several side by side."""
    if part is None:
        return [[tensors.take(name)] for name in names]
    found, before = [], 0
    for name in names:
        tensor = tensors.take(name)
        if part.dim == 1:
            found.append([tensor[:, start:stop] for start, stop in part.ranges])
            continue
        clipped = [(max(start - before, 0), min(stop - before, len(tensor))) for start, stop in part.ranges]
        found += [[tensor[start:stop]] for start, stop in clipped if start < stop]
        before += len(tensor)
    return found


def _as_linear(shape: Sequence[int], slot: Tensor) -> tuple[int, ...]:
    """A convolution of one pixel as the matrix that it is, where the network has a linear layer."""
    return tuple(shape[:2] if len(shape) == 4 and tuple(shape[2:]) == (1, 1) and slot.ndim == 2 else shape)


def _joined(rows: list[list[Tensor]], slot: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The pieces each copied straight to their place, so that no joined copy is made on the way."""
    joined = torch.empty(slot.shape, dtype=dtype, device=device)
    heights = [len(pieces[0]) for pieces in rows]
    for row, pieces in zip(torch.split(joined, heights), rows, strict=True):
        start = 0
        for piece in pieces:
            width = piece.shape[1] if len(pieces) > 1 else 0
            place = row[:, start : start + width] if width else row
            place.copy_(piece.view(place.shape) if piece.is_contiguous() else piece.reshape(place.shape))
            start += width
    return joined


def _assign(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the network has `name`, a parameter or a buffer."""
    path, _, last = name.rpartition(".")
    module = network.get_submodule(path)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor


class Checkpoint:
    """The tensors of one or more open safetensors files by name."""

    def __init__(self, files: Sequence[Any]) -> None:
        self.place: dict[str, Any] = {}
        for file in files:
            self.place |= dict.fromkeys(file.keys(), file)

    def names(self) -> Set[str]:
        return self.place.keys()

    def shape(self, name: str) -> Sequence[int]:
        found: Sequence[int] = self.place[name].get_slice(name).get_shape()
        return found

    def take(self, name: str) -> Tensor:
        """Mapped, not read: what is not looked at stays on the disk."""
        tensor: Tensor = self.place[name].get_tensor(name)
        return tensor


class Held:
    """Tensors that are in memory, and leave it one by one."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Set[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self.tensors[name].shape

    def take(self, name: str) -> Tensor:
        return self.tensors.pop(name)


def _check_names(network: nn.Module, names: Set[str], sources: Sources, where: str) -> None:
    wanted = {source for name in network.state_dict() for source in sources(name)}
    missing, surplus = sorted(wanted - names), sorted(names - wanted)
    if missing or surplus:
        kind = type(network).__name__
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"holds {_some(surplus)}, which {kind} does not have"] if surplus else []
        raise UserError(f"{where} is no checkpoint of this {kind}: it {' and '.join(parts)}")


def _check_shape(parts: list[tuple[int, ...]], slot: Tensor, names: Sequence[str], where: str) -> None:
    """Raises UserError naming the first tensor whose shape cannot be a part of the slot."""
    for name, part in zip(names, parts, strict=True):
        if part[1:] != slot.shape[1:] or (len(parts) == 1 and part != slot.shape):
            needed = slot.shape if len(parts) == 1 else ("...", *slot.shape[1:])
            raise UserError(
                f"{where}: {name} has the shape {list(part)}, this network needs [{', '.join(map(str, needed))}]"
            )
    if sum(part[0] for part in parts) != len(slot):
        raise UserError(
            f"{where}: {', '.join(names)} have {sum(part[0] for part in parts)} rows together, "
            f"this network needs {len(slot)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def where(files: Sequence[Path]) -> str:
    """What an error calls the files."""
    return str(files[0] if len(files) == 1 else files[0].parent)


def renamed(name: str, rules: Mapping[str, Sequence[str]]) -> list[str]:
    """The checkpoint's names of our tensor `name`.

    A rule says what stands in place of a dotted part of our name; where that is several, the tensor is several joined.
    Of two rules that fit in the same place the longer is taken.
    """
    parts = "|".join(re.escape(part) for part in sorted(rules, key=len, reverse=True))
    found = re.findall(rf"(?<![^.])(?:{parts})(?![^.])|[^.]+|\.", name)
    names = [""]
    for part in found:
        names = [start + end for start in names for end in rules.get(part, (part,))]
    return names
