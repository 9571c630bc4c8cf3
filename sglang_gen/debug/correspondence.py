"""Matches modules of diffusers' network with ours by the names of their weights.

A family's `sources` maps each of our tensors to the checkpoint tensors from which it is made. Two modules that hold the
same tensors correspond to each other, so no second table is needed that could disagree with the one that loads weights.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sglang_gen.weights.load import Sources

Pairs = dict[str, tuple[str, ...]]  # our module -> theirs; several if ours fuses them, in the order of the fusion


def correspond(ours: nn.Module, theirs: nn.Module, sources: Sources) -> Pairs:
    """Each of our modules with its counterpart in diffusers' network, by name; the network itself is ''.

    A layer is matched with the layer, or the layers that it fuses, whose tensors it holds. A module of several layers
    is matched with the outermost module that holds exactly the same tensors. A module that wraps a single layer is left
    out: what it adds to the layer (such as the shape of a modulation) may differ between the implementations.
    """
    state: Mapping[str, Any] = ours.state_dict()
    origin = {name: tuple(sources(name)) for name in state}
    by_tensors = _by_tensors(theirs)
    pairs: Pairs = {}
    for name, module in ours.named_modules():
        inside = [tensor for tensor in state if tensor.startswith(f"{name}." if name else "")]
        if not inside:
            continue
        if not list(module.children()):
            layers = {tuple(source.rpartition(".")[0] for source in origin[tensor]) for tensor in inside}
            if len(layers) == 1:
                pairs[name] = layers.pop()
        elif len({tensor.rpartition(".")[0] for tensor in inside}) > 1:
            same = by_tensors.get(frozenset(source for tensor in inside for source in origin[tensor]))
            if same is not None:
                pairs[name] = (same,)
    return pairs


def _by_tensors(network: nn.Module) -> dict[frozenset[str], str]:
    """Set of tensor names -> the outermost module that holds exactly these; containers of modules are left out."""
    names, outermost = list(network.state_dict()), dict[frozenset[str], str]()
    for name, module in network.named_modules():
        inside = frozenset(tensor for tensor in names if tensor.startswith(f"{name}." if name else ""))
        if inside and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            outermost.setdefault(inside, name)
    return outermost
