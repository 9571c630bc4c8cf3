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
from sglang_gen.engine.meta_trace import Shapes
from sglang_gen.errors import RunError, first_line


def _compiled(function: Any, ranks: int) -> Any:
    if ranks == 1:
        return torch.compile(function, fullgraph=True, dynamic=False)
    from sglang_gen.parallel import inductor_lowering  # imports inductor, which takes seconds

    inductor_lowering.register()
    return torch.compile(function, fullgraph=True, dynamic=False, options=inductor_lowering.OPTIONS)


class Compiled:
    """The compiled parts of a network, and how many graphs each class of them may need."""

    def __init__(self, network: Any, regions: tuple[type, ...], device: str, ranks: int = 1) -> None:
        """Compile `forward` of every module of the classes `regions`; without any `evaluate` of the whole network.

        Functions are compiled, not modules, so that hooks stay outside. Collectives of several ranks keep their order.
        Raises UserError without a C++ compiler.
        """
        env.require_compiler(device)
        env.keep_compiled()
        self.mode = "regional" if regions else "full"
        self.expected: dict[type, set[Any]] = {}
        self.limiting = False
        modules: list[Any] = [module for module in network.modules() if isinstance(module, regions)]
        for module in modules:
            module.forward = self._counted(type(module), _compiled(module.forward, ranks))
        if not regions:
            network.evaluate = self._counted(type(network), _compiled(network.evaluate, ranks))

    def expect(self, shapes: Shapes) -> None:
        """Allow the graphs that calls of these shapes need."""
        for kind, calls in shapes.blocks.items():
            self.expected.setdefault(kind, set()).update(calls)

    def _counted(self, kind: type, compiled: Any) -> Any:
        """torch has one limit for everything; in a call of a block it is that of the block's class."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.limiting:
                dynamo.recompile_limit = len(self.expected.get(kind, ()))
            return compiled(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside, more graphs of a class of blocks than expected are a RunError, and so is a failed compilation."""
        with dynamo.patch(recompile_limit=dynamo.recompile_limit, fail_on_recompile_limit_hit=True):
            self.limiting = True
            try:
                yield
            except FailOnRecompileLimitHit as error:
                limit = dynamo.recompile_limit
                raise RunError(f"compile: a block was compiled for more than the {limit} expected shapes") from error
            except BackendCompilerFailed as error:
                raise RunError(f"compile: torch.compile failed: {first_line(error.inner_exception)}") from error
            except Unsupported as error:
                raise RunError(f"compile: torch.compile cannot trace this network: {first_line(error)}") from error
            finally:
                self.limiting = False
