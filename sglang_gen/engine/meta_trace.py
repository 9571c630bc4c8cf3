"""What one evaluation of a network will look like: a rehearsal on the meta device, where nothing is computed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.parallel.sharded_network import Placed


@dataclass
class Shapes:
    """`attention`: (B, H, L, S, D) of each call -> calls. `blocks`: distinct calls of each watched class."""

    attention: Counter[tuple[int, ...]] = field(default_factory=Counter)
    blocks: dict[type, set[Any]] = field(default_factory=dict)


def rehearse(
    twin: Placed,
    regions: tuple[type, ...],
    evaluate: Callable[[Any], Any],
    attended: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Shapes:
    """The shapes that `evaluate` meets in a network without memory, as this rank has it.

    `attended` is told of every attention's q, k, v and result.
    """
    found = Shapes()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.attention.update([(*q.shape[:3], k.shape[2], q.shape[3])])
        out = torch.empty_like(q)
        if attended is not None:
            attended(q, k, v, out)
        return out

    def summing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))

    twin.set_kernel(attend, summing)
    for module in twin.network.modules():
        if isinstance(module, regions):
            module.register_forward_pre_hook(lambda module, args: _note(found, module, args))
    with torch.no_grad():
        evaluate(twin.entrance)
    return found


def _note(found: Shapes, module: nn.Module, args: tuple[Any, ...]) -> None:
    weights = tuple(tuple(each.shape) for each in module.parameters())
    inputs = tuple(tuple(each.shape) for each in args if isinstance(each, Tensor))
    found.blocks.setdefault(type(module), set()).add((weights, inputs))
