"""Checkpoints of diffusers folders into our networks: one tensor after the other, every name accounted for."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sglang_gen.errors import UserError

Sources = Callable[[str], Sequence[str]]  # our name of a tensor -> the checkpoint's names, joined along dimension 0


def load(
    build: Callable[[], nn.Module], files: Sequence[Path], sources: Sources, dtype: torch.dtype, device: str
) -> nn.Module:
    """A network that is built on meta and filled tensor by tensor, so that its weights are in memory once.

    Raises UserError naming tensors that are missing, that nothing takes, or whose shape is another.
    """
    with torch.device("meta"):
        network = build()
    with ExitStack() as stack:
        checkpoint = Checkpoint([stack.enter_context(safe_open(file, framework="pt")) for file in files])
        _check_names(network, checkpoint, sources, files)
        for name, slot in network.state_dict().items():
            tensor = checkpoint.read(sources(name)).to(device, dtype)
            if tensor.shape == (*slot.shape, 1, 1):
                tensor = tensor.flatten(1)  # a convolution of one pixel, which is a linear layer of ours
            if tensor.shape != slot.shape:
                raise UserError(
                    f"{_where(files)}: {sources(name)[0]} has the shape {list(tensor.shape)}, "
                    f"this network needs {list(slot.shape)}"
                )
            _assign(network, name, tensor)
    return network.eval()


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

    def read(self, names: Sequence[str]) -> Tensor:
        tensors = [self.place[name].get_tensor(name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component folder: those of its index, else all of its only set."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))[:1]


def _check_names(network: nn.Module, checkpoint: Checkpoint, sources: Sources, files: Sequence[Path]) -> None:
    wanted = {source for name in network.state_dict() for source in sources(name)}
    missing, surplus = sorted(wanted - checkpoint.place.keys()), sorted(checkpoint.place.keys() - wanted)
    if missing or surplus:
        kind = type(network).__name__
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"holds {_some(surplus)}, which {kind} does not have"] if surplus else []
        raise UserError(f"{_where(files)} is no checkpoint of this {kind}: it {' and '.join(parts)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _where(files: Sequence[Path]) -> str:
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
