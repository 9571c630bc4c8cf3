"""torch.compile of the network's own blocks: one graph for all repeats of a block, kept on disk.

Only blocks whose inputs differ in shape or whose weights do are compiled anew. How many that are is known before, so
that one more is an error and not a silent return to eager execution.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported

from sglang_gen import env
from sglang_gen.engine.shapes import Shapes
from sglang_gen.errors import RunError, UserError, first_line


def _compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)


class Compiled:
    """The compiled parts of a network, and how many graphs each class of them may need."""

    def __init__(self, network: Any, regions: tuple[type, ...], device: str) -> None:
        """Compile `forward` of every module of the classes `regions`; without any `evaluate` of the whole network.

        Functions are compiled, not modules, so that hooks stay outside. Raises UserError without a C++ compiler.
        """
        if not env.can_compile(device):
            raise UserError(
                "compile: torch.compile on CPU needs a C++ compiler (g++ or clang++); run with compile=none"
            )
        env.keep_compiled()
        self.mode = "regional" if regions else "full"
        self.expected: dict[type, set[Any]] = {}
        modules: list[Any] = [module for module in network.modules() if isinstance(module, regions)]
        for module in modules:
            module.forward = _compiled(module.forward)
        if not regions:
            network.evaluate = _compiled(network.evaluate)

    def expect(self, shapes: Shapes) -> None:
        """Allow the graphs that calls of these shapes need."""
        for kind, calls in shapes.blocks.items():
            self.expected.setdefault(kind, set()).update(calls)

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside, more graphs of a block than were expected are a RunError, and so is a failed compilation."""
        limit = max((len(calls) for calls in self.expected.values()), default=1)
        with dynamo.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
            try:
                yield
            except FailOnRecompileLimitHit as error:
                raise RunError(f"compile: a block was compiled for more than the {limit} expected shapes") from error
            except BackendCompilerFailed as error:
                raise RunError(f"compile: torch.compile failed: {first_line(error.inner_exception)}") from error
            except Unsupported as error:
                raise RunError(f"compile: torch.compile cannot trace this network: {first_line(error)}") from error
