"""What one evaluation of a network will look like: a rehearsal on the meta device, where nothing is computed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.models.attention import Attend


@dataclass
class Shapes:
    """`attention`: (B, H, L, S, D) of each call -> calls. `blocks`: distinct calls of each watched class."""

    attention: Counter[tuple[int, ...]] = field(default_factory=Counter)
    blocks: dict[type, set[Any]] = field(default_factory=dict)


def rehearse(network: nn.Module, regions: tuple[type, ...], evaluate: Callable[[nn.Module], Any]) -> Shapes:
    """The shapes that `evaluate` meets in a twin of the network without weights, which has its config and dtype."""
    kind: Any = type(network)
    with torch.device("meta"):
        twin: nn.Module = kind(network.config).to(next(network.parameters()).dtype)
    found = Shapes()
    for module in twin.modules():
        if isinstance(module, Attend):
            module.register_forward_pre_hook(lambda _, args: found.attention.update([_attention(*args)]))
        if isinstance(module, regions):
            module.register_forward_pre_hook(lambda module, args: _note(found, module, args))
    with torch.no_grad():
        evaluate(twin)
    return found


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*q.shape[:3], k.shape[2], q.shape[3])


def _note(found: Shapes, module: nn.Module, args: tuple[Any, ...]) -> None:
    weights = tuple(tuple(each.shape) for each in module.parameters())
    inputs = tuple(tuple(each.shape) for each in args if isinstance(each, Tensor))
    found.blocks.setdefault(type(module), set()).add((weights, inputs))
