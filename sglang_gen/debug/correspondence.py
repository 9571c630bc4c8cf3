"""Which module of diffusers' network is which of ours, from the names of their weights.

The glue of a pipeline says for every tensor of ours which tensors of a checkpoint make it up. Two modules that hold the
same tensors are the same module: there is no second table that could disagree with the one that loads the weights.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sglang_gen.weights.load import Sources

Pairs = dict[str, tuple[str, ...]]  # our module -> theirs; several where ours is a fusion of them, in its order


def correspond(ours: nn.Module, theirs: nn.Module, sources: Sources) -> Pairs:
    """Every module of ours that has one meaning over there, by name; the network itself is ''.

    A layer stands beside the layer, or the layers joined, whose tensors it holds. A module of several layers stands
    beside the outermost that holds exactly the tensors of all of them. One that wraps a single layer is left out: what
    it adds to the layer (a modulation's shape, say) is a choice of each side.
    """
    held: Mapping[str, Any] = ours.state_dict()
    origin = {name: tuple(sources(name)) for name in held}
    by_tensors = _by_tensors(theirs)
    pairs: Pairs = {}
    for name, module in ours.named_modules():
        inside = [tensor for tensor in held if tensor.startswith(f"{name}." if name else "")]
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
    """The outermost module that computes with exactly these tensors; lists of modules compute nothing."""
    held, found = list(network.state_dict()), dict[frozenset[str], str]()
    for name, module in network.named_modules():
        inside = frozenset(tensor for tensor in held if tensor.startswith(f"{name}." if name else ""))
        if inside and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found.setdefault(inside, name)
    return found
