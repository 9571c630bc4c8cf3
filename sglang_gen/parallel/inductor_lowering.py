"""Collectives in the code that inductor generates: in the order of the program, and with what they send kept alive.

Inductor may put operators in any order that their data allow. On two ranks of one group, whose shapes differ, it can
choose two orders, and one would wait for a collective that the other has not begun; nor does it know that what lies
between a start and its arrival should be computed in between. So each of our operators is told what it comes after.
The lowerings hold for this process, whoever compiles.
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
    """Collectives of one graph: the last one, and by the tensors that come what is sent and the operator that began."""

    last: Any = None
    started: dict[str, tuple[Any, Any]] = field(default_factory=dict)


_flights: "WeakKeyDictionary[Any, Flights]" = WeakKeyDictionary()
OPTIONS: dict[str, Any] = {"reorder_for_locality": False}  # of inductor: its graph keeps the order of the program


def register() -> None:
    """Lower our operators in order."""
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
    """After all that the program computes since the start, which comes after the start.

    Of the source inductor may have made a second copy for this operator; what is kept is the one that is being sent.
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
    """A tensor as contiguous memory, which all that read it share."""
    return ir.TensorBox(ir.ExternKernel.require_contiguous(ir.TensorBox(ir.ExternKernel.realize_input(x))))


def _in_turn(operator: Any, *args: Any) -> tuple[Any, Any]:
    """What a call gives, and its kernel, which comes after that of the last collective of this graph."""
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
    """Products, convolutions, attention, and other collectives: what is more than a loop over numbers."""
    return isinstance(operation, ir.ExternKernel | ir.TemplateBuffer) and not isinstance(operation, ir.MultiOutput)


def _of_graph() -> Flights:
    return _flights.setdefault(V.graph, Flights())
