"""Loads checkpoints of diffusers folders into our networks, tensor by tensor, with all names and shapes checked."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sglang_gen.errors import UserError
from sglang_gen.models.layers import WHOLE, OwnTensors, Shard, own_tensors, place

# Our tensor name -> checkpoint names, each with the section of the layer's outputs that it fills (WHOLE: all of them).
Sources = Callable[[str], Mapping[str, str]]
Shrink = Callable[[nn.Module], Mapping[str, Shard]]  # shrinks a network to this rank's shard; the shards by tensor name


def unsharded(network: nn.Module) -> Mapping[str, Shard]:
    """A `Shrink` that keeps the whole network."""
    return {}


@dataclass(frozen=True)
class Slot:
    """A tensor of one module of a network, to be filled from a checkpoint."""

    name: str  # in the network
    module: nn.Module
    key: str  # in the module
    shape: tuple[int, ...]
    sections: tuple[str, ...] = ()  # of the layer's outputs, in their order

    def place(self, tensor: Tensor) -> None:
        if isinstance(self.module, OwnTensors):
            self.module.place(self.key, tensor)
        else:
            place(self.module, self.key, tensor)

    def ordered(self, sources: Mapping[str, str]) -> list[str]:
        """The checkpoint names in the order of the layer's sections."""
        if [*sources.values()] == [WHOLE]:
            return [*sources]
        by_section = {section: name for name, section in sources.items()}
        assert by_section.keys() == {*self.sections}, f"{self.name} has the sections {self.sections}, not {sources}"
        return [by_section[section] for section in self.sections]


def slots(network: nn.Module) -> Iterator[Slot]:
    """The tensors of a network that a checkpoint must provide; a layer that owns its tensors says which."""
    for path, module in network.named_modules():
        shapes = module.tensors() if isinstance(module, OwnTensors) else own_tensors(module)
        for key, shape in shapes.items():
            sections = tuple(getattr(module, "sections", ()))
            yield Slot(f"{path}.{key}".lstrip("."), module, key, shape, sections)


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
    check(network, tensors, sources, where)
    stream(network, tensors, sources, shrink(network), dtype, device)
    return network


def check(network: nn.Module, tensors: Tensors, sources: Sources, where: str) -> None:
    """Compare a whole network with a checkpoint before a tensor is read. Raises the errors of `fill`."""
    names = {slot.name: slot.ordered(sources(slot.name)) for slot in slots(network)}
    _check_names(network, tensors.names(), {source for each in names.values() for source in each}, where)
    for slot in slots(network):
        shapes = [_as_linear(tensors.shape(source), slot.shape) for source in names[slot.name]]
        _check_shape(shapes, slot.shape, names[slot.name], where)


def stream(
    network: nn.Module,
    tensors: Tensors,
    sources: Sources,
    shards: Mapping[str, Shard],
    dtype: torch.dtype,
    device: str,
) -> None:
    """Fill a network on meta tensor by tensor; of a tensor that is in `shards` only that part is read."""
    for slot in slots(network):
        rows = _read(tensors, slot.ordered(sources(slot.name)), shards.get(slot.name))
        if slot.name not in shards and len(rows) == 1:
            slot.place(rows[0][0].to(device, dtype).view(slot.shape))
        else:
            slot.place(_joined(rows, slot.shape, dtype, device))
    network.eval()


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


def _as_linear(shape: Sequence[int], needed: Sequence[int]) -> tuple[int, ...]:
    """The shape of a checkpoint tensor; a 1 x 1 convolution counts as a matrix if the network has a linear layer."""
    return tuple(shape[:2] if len(shape) == 4 and tuple(shape[2:]) == (1, 1) and len(needed) == 2 else shape)


def _joined(rows: list[list[Tensor]], shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """One tensor with every piece copied straight to its place, without a concatenated copy in between."""
    joined = torch.empty(shape, dtype=dtype, device=device)
    heights = [len(pieces[0]) for pieces in rows]
    for row, pieces in zip(torch.split(joined, heights), rows, strict=True):
        start = 0
        for piece in pieces:
            width = piece.shape[1] if len(pieces) > 1 else 0
            there = row[:, start : start + width] if width else row
            there.copy_(piece.view(there.shape) if piece.is_contiguous() else piece.reshape(there.shape))
            start += width
    return joined


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


def _check_names(network: nn.Module, names: Set[str], wanted: Set[str], where: str) -> None:
    missing, surplus = sorted(wanted - names), sorted(names - wanted)
    if missing or surplus:
        kind = type(network).__name__
        problems = [f"lacks {_some(missing)}"] if missing else []
        problems += [f"holds {_some(surplus)}, which {kind} does not have"] if surplus else []
        raise UserError(f"{where} is not a checkpoint of this {kind}: it {' and '.join(problems)}")


def _check_shape(shapes: list[tuple[int, ...]], needed: tuple[int, ...], names: Sequence[str], where: str) -> None:
    """Raises UserError that names the first tensor whose shape does not fit."""
    for name, shape in zip(names, shapes, strict=True):
        if shape[1:] != needed[1:] or (len(shapes) == 1 and shape != needed):
            shown = needed if len(shapes) == 1 else ("...", *needed[1:])
            raise UserError(
                f"{where}: {name} has the shape {list(shape)}, this network needs [{', '.join(map(str, shown))}]"
            )
    if sum(shape[0] for shape in shapes) != needed[0]:
        raise UserError(
            f"{where}: {', '.join(names)} have {sum(shape[0] for shape in shapes)} rows together, "
            f"this network needs {needed[0]}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def where(files: Sequence[Path]) -> str:
    """Name of the files in errors: the file, or the folder of several."""
    return str(files[0] if len(files) == 1 else files[0].parent)


Rules = Mapping[str, str | Mapping[str, str]]  # dotted part of our names -> part, or part by section, of theirs


def renamed(name: str, rules: Rules) -> dict[str, str]:
    """The checkpoint names of our tensor `name`, each with its section of the layer's outputs.

    A rule replaces a dotted part of our name. A rule with a name for each section means that the checkpoint has one
    tensor for each. The longest matching rule wins.
    """
    patterns = "|".join(re.escape(part) for part in sorted(rules, key=len, reverse=True))
    names = {"": WHOLE}
    for part in re.findall(rf"(?<![^.])(?:{patterns})(?![^.])|[^.]+|\.", name):
        rule = rules.get(part, part)
        ends = {WHOLE: rule} if isinstance(rule, str) else rule
        names = {start + end: before or section for start, before in names.items() for section, end in ends.items()}
    return names
