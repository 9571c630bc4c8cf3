"""Traces one evaluation of a network on the meta device, where nothing is computed, to record its shapes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.parallel.sharded_network import ParallelNetwork
from sglang_gen.tensor_tree import tensors


@dataclass
class Shapes:
    """`attention`: (B, H, L, S, D) -> number of calls; behind D, "masked" for a mask, "lse" for a log-sum-exp.

    `blocks`: class -> distinct (weight shapes and dtypes, input shapes).
    """

    attention: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    blocks: dict[type, set[Any]] = field(default_factory=dict)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, held: Callable[[Tensor, Tensor, Tensor], int]) -> Tensor:
    """An empty result of attention on meta; what the kernel holds lives until the call returns."""
    workspace = torch.empty(held(q, k, v), dtype=torch.uint8, device="meta")
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    del workspace
    return out


def trace_on_meta(
    meta_copy: ParallelNetwork,
    regions: tuple[type, ...],
    evaluate: Callable[[Any], Any],
    on_attention: Callable[..., None] | None = None,
    held: Callable[[Tensor, Tensor, Tensor], int] = lambda q, k, v: 0,
) -> Shapes:
    """Shapes of the attention calls and of the calls of `regions` in `evaluate`, on this rank's meta copy.

    `on_attention` is called with q, k, v, the result and, if there is one, the mask of every attention. `held` returns
    the bytes that the kernel holds besides these, which are allocated on meta for the time of the call.
    """
    shapes = Shapes()

    def attend(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor, tags: tuple[str, ...] = ()) -> Tensor:
        masked = ("masked",) if mask else ()
        shapes.attention.update([(*q.shape[:3], k.shape[2], q.shape[3], *masked, *tags)])
        out = fused_attention(q, k, v, held)
        if on_attention is not None:
            on_attention(q, k, v, out, *mask)
        return out

    def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(q, k, v, *mask, tags=("lse",))
        return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))

    meta_copy.set_kernel(attend, attend_with_lse if meta_copy.returns_lse else None)
    for module in meta_copy.network.modules():
        if isinstance(module, regions) and hasattr(module, "evaluate"):
            module.evaluate = _noting(shapes, module, module.evaluate)
        elif isinstance(module, regions):
            module.register_forward_pre_hook(lambda module, args: _note(shapes, module, args))
    with torch.no_grad():
        evaluate(meta_copy.entrance)
    return shapes


def _noting(shapes: Shapes, network: nn.Module, evaluate: Any) -> Any:
    """The `evaluate` of a network that is compiled as a whole; the lengths of its texts are in the conditioning."""

    def noted(latents: Tensor, conditioning: Any) -> Tensor:
        _note(shapes, network, (latents, *tensors(conditioning)))
        prediction: Tensor = evaluate(latents, conditioning)
        return prediction

    return noted


def _note(shapes: Shapes, module: nn.Module, args: tuple[Any, ...]) -> None:
    weights = tuple((tuple(weight.shape), weight.dtype) for weight in module.parameters())
    inputs = tuple(tuple(x.shape) for x in args if isinstance(x, Tensor))
    shapes.blocks.setdefault(type(module), set()).add((weights, inputs))
