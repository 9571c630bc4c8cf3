"""Loads checkpoints of diffusers folders into our networks, tensor by tensor, with all names and shapes checked."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sglang_gen.errors import UserError
from sglang_gen.parallel.tensor import Shard

Sources = Callable[[str], Sequence[str]]  # our tensor name -> checkpoint names, concatenated along dimension 0
Shrink = Callable[[nn.Module], Mapping[str, Shard]]  # shrinks a network to this rank's shard; the shards by tensor name


def unsharded(network: nn.Module) -> Mapping[str, Shard]:
    """A `Shrink` that keeps the whole network."""
    return {}


class Tensors(Protocol):
    """A source of tensors by name; each tensor is read once."""

    def names(self) -> Set[str]: ...

    def shape(self, name: str) -> Sequence[int]: ...

    def take(self, name: str) -> Tensor: ...


def load(
    build: Callable[[], nn.Module],
    files: Sequence[Path],
    sources: Sources,
    dtype: torch.dtype,
    device: str,
    shrink: Shrink = unsharded,
) -> nn.Module:
    """Load a network from safetensors files, tensor by tensor; see `fill`."""
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
    shrink: Shrink = unsharded,
) -> nn.Module:
    """Build a network on the meta device and fill it tensor by tensor, so that its weights are in memory only once.

    `shrink` reduces the network to this rank's shard, and only that part of each tensor is read. `where` names the
    checkpoint in errors. Raises UserError that names missing or unexpected tensors, or a shape that does not match.
    """
    with torch.device("meta"):
        network = build()
    _check_names(network, tensors.names(), sources, where)
    slots = network.state_dict()
    for name, slot in slots.items():
        _check_shape([_as_linear(tensors.shape(source), slot) for source in sources(name)], slot, sources(name), where)
    shards = shrink(network)
    for name, slot in network.state_dict().items():
        rows = _read(tensors, sources(name), shards.get(name))
        if name not in shards and len(rows) == 1:
            _assign(network, name, rows[0][0].to(device, dtype).view(slot.shape))
        else:
            _assign(network, name, _joined(rows, slot, dtype, device))
    return network.eval()


def _read(tensors: Tensors, names: Sequence[str], shard: Shard | None) -> list[list[Tensor]]:
    """Pieces of the named tensors: an outer list along dimension 0, inner lists along dimension 1."""
    if shard is None:
        return [[tensors.take(name)] for name in names]
    rows, before = [], 0
    for name in names:
        tensor = tensors.take(name)
        if shard.dim == 1:
            rows.append([tensor[:, start:stop] for start, stop in shard.ranges])
            continue
        clipped = [(max(start - before, 0), min(stop - before, len(tensor))) for start, stop in shard.ranges]
        rows += [[tensor[start:stop]] for start, stop in clipped if start < stop]
        before += len(tensor)
    return rows


def _as_linear(shape: Sequence[int], slot: Tensor) -> tuple[int, ...]:
    """The shape of a checkpoint tensor; a 1 x 1 convolution counts as a matrix if the network has a linear layer."""
    return tuple(shape[:2] if len(shape) == 4 and tuple(shape[2:]) == (1, 1) and slot.ndim == 2 else shape)


def _joined(rows: list[list[Tensor]], slot: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """One tensor with every piece copied straight to its place, without a concatenated copy in between."""
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
    """Set the parameter or buffer `name` of the network to `tensor`."""
    path, _, last = name.rpartition(".")
    module = network.get_submodule(path)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor


class Checkpoint:
    """The tensors of open safetensors files, by name."""

    def __init__(self, files: Sequence[Any]) -> None:
        self.place: dict[str, Any] = {}
        for file in files:
            self.place |= dict.fromkeys(file.keys(), file)

    def names(self) -> Set[str]:
        return self.place.keys()

    def shape(self, name: str) -> Sequence[int]:
        shape: Sequence[int] = self.place[name].get_slice(name).get_shape()
        return shape

    def take(self, name: str) -> Tensor:
        """The memory-mapped tensor; only the parts that are used are read from disk."""
        tensor: Tensor = self.place[name].get_tensor(name)
        return tensor


class InMemoryTensors:
    """Tensors in memory; each is released when it is taken."""

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
        problems = [f"lacks {_some(missing)}"] if missing else []
        problems += [f"holds {_some(surplus)}, which {kind} does not have"] if surplus else []
        raise UserError(f"{where} is not a checkpoint of this {kind}: it {' and '.join(problems)}")


def _check_shape(shapes: list[tuple[int, ...]], slot: Tensor, names: Sequence[str], where: str) -> None:
    """Raises UserError that names the first tensor whose shape does not fit into the slot."""
    for name, shape in zip(names, shapes, strict=True):
        if shape[1:] != slot.shape[1:] or (len(shapes) == 1 and shape != slot.shape):
            needed = slot.shape if len(shapes) == 1 else ("...", *slot.shape[1:])
            raise UserError(
                f"{where}: {name} has the shape {list(shape)}, this network needs [{', '.join(map(str, needed))}]"
            )
    if sum(shape[0] for shape in shapes) != len(slot):
        raise UserError(
            f"{where}: {', '.join(names)} have {sum(shape[0] for shape in shapes)} rows together, "
            f"this network needs {len(slot)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def where(files: Sequence[Path]) -> str:
    """Name of the files in errors: the file, or the folder of several."""
    return str(files[0] if len(files) == 1 else files[0].parent)


def renamed(name: str, rules: Mapping[str, Sequence[str]]) -> list[str]:
    """The checkpoint names of our tensor `name`.

    A rule replaces a dotted part of our name; a rule with several replacements means that the checkpoint's tensors are
    concatenated. The longest matching rule wins.
    """
    patterns = "|".join(re.escape(part) for part in sorted(rules, key=len, reverse=True))
    names = [""]
    for part in re.findall(rf"(?<![^.])(?:{patterns})(?![^.])|[^.]+|\.", name):
        names = [start + end for start in names for end in rules.get(part, (part,))]
    return names
