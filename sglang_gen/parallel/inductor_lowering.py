"""Inductor lowerings that keep collectives in program order and their inputs alive.

Inductor may reorder operators as far as data dependencies allow. Ranks of one group with different shapes could get
different orders and deadlock. It also does not know that the computation between the start of a collective and its
arrival should overlap with it. The lowerings therefore add explicit dependencies to our operators. They are registered
for the whole process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V


@dataclass
class Flights:
    """Collectives of one graph: the last one, and output name -> (source, starting kernel) of those in flight."""

    last: Any = None
    started: dict[str, tuple[Any, Any]] = field(default_factory=dict)


_flights: "WeakKeyDictionary[Any, Flights]" = WeakKeyDictionary()
OPTIONS: dict[str, Any] = {"reorder_for_locality": False}  # inductor options: keep the program order


def register() -> None:
    """Register the lowerings of our collectives."""
    ours = torch.ops.sglang_gen
    for starting in (ours.gather.default, ours.exchange.default):
        register_lowering(starting, type_promotion_kind=None)(_starting(starting))
    register_lowering(ours.arrived.default, type_promotion_kind=None)(_arriving)
    register_lowering(ours.all_reduce.default, type_promotion_kind=None)(_summing)


def _starting(operator: Any) -> Callable[..., Any]:
    def lowered(x: Any, *rest: Any) -> Any:
        source = _in_memory(x)
        coming, kernel = _in_turn(operator, source, *rest)
        _of_graph().started[coming.get_name()] = source, kernel
        return coming

    return lowered


def _arriving(coming: Any, source: Any) -> Any:
    """Schedule the kernels between start and arrival after the start, and the arrival after those kernels.

    Inductor may have copied the source for this operator; the buffer that is being sent is the one kept alive.
    """
    source, start = _of_graph().started.pop(coming.get_name())
    operations = V.graph.operations
    between = [each for each in operations[operations.index(start) + 1 :] if _computes(each)]
    for kernel in between:
        _put_after(kernel, start)
    arrived, waiting = _in_turn(torch.ops.sglang_gen.arrived.default, coming, source)
    for kernel in between:
        _put_after(waiting, kernel)
    return arrived


def _summing(x: Any, *rest: Any) -> Any:
    return _in_turn(torch.ops.sglang_gen.all_reduce.default, _in_memory(x), *rest)[0]


def _in_memory(x: Any) -> Any:
    """Realize a tensor as one contiguous buffer that all readers share."""
    return ir.TensorBox(ir.ExternKernel.require_contiguous(ir.TensorBox(ir.ExternKernel.realize_input(x))))


def _in_turn(operator: Any, *args: Any) -> tuple[Any, Any]:
    """Output and kernel of a call, scheduled after the last collective of this graph."""
    before = len(V.graph.operations)
    out = fallback_handler(operator, add_to_fallback_set=False)(*args)  # type: ignore[no-untyped-call]
    (kernel,) = (each for each in V.graph.operations[before:] if isinstance(each, ir.FallbackKernel))
    flights = _of_graph()
    if flights.last is not None:
        _put_after(kernel, flights.last)
    flights.last = kernel
    return out, kernel


def _put_after(kernel: Any, earlier: Any) -> None:
    for buffer in earlier.get_outputs():
        V.graph.additional_buffer_deps[kernel.get_operation_name()].add(buffer.get_name())


def _computes(operation: Any) -> bool:
    """True for matrix products, convolutions, attention and collectives, false for pointwise loops and reductions."""
    return isinstance(operation, ir.ExternKernel | ir.TemplateBuffer) and not isinstance(operation, ir.MultiOutput)


def _of_graph() -> Flights:
    return _flights.setdefault(V.graph, Flights())
