"""Regional torch.compile: one graph for all repeats of a block, cached on disk.

A block class is recompiled only for other input or weight shapes. The number of graphs is known in advance, so an
unexpected recompilation is an error instead of a silent fallback to eager execution.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported

from sglang_gen import env
from sglang_gen.engine.meta_trace import Shapes
from sglang_gen.errors import RunError


def gpu_options(device: str, deterministic: bool) -> dict[str, Any]:
    """Inductor's options for kernels of a GPU: fused epilogues, and block sizes that are searched for each kernel.

    The search times kernels, and block sizes change the order of sums, so a deterministic run does without.
    """
    return {"epilogue_fusion": True, "coordinate_descent_tuning": not deterministic} if device == "cuda" else {}


def _compiled(function: Any, ranks: int, options: dict[str, Any] | None = None) -> Any:
    options = options or {}
    if ranks > 1:
        from sglang_gen.parallel import inductor_lowering  # imports inductor, which takes seconds

        inductor_lowering.register()
        options = {**options, **inductor_lowering.OPTIONS}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)


class Compiled:
    """The compiled modules of a network, and the number of graphs that each of their classes may need."""

    def __init__(
        self, network: Any, regions: tuple[type, ...], device: str, ranks: int = 1, deterministic: bool = False
    ) -> None:
        """Compile `forward` of every module whose class is in `regions`; if empty, the whole network's `evaluate`.

        Functions instead of modules are compiled, so hooks stay outside. Over several ranks collectives keep their
        order. Raises UserError if this machine cannot compile.
        """
        env.require_compiler(device)
        env.keep_compiled()
        self.mode = "regional" if regions else "full"
        self.expected: dict[type, set[Any]] = {}
        self.limiting = False
        options = gpu_options(device, deterministic)
        modules: list[Any] = [module for module in network.modules() if isinstance(module, regions)]
        for module in modules:
            module.forward = self._with_limit(type(module), _compiled(module.forward, ranks, options))
        if not regions:
            network.evaluate = self._with_limit(type(network), _compiled(network.evaluate, ranks, options))

    def expect(self, shapes: Shapes, graphs: int = 1) -> None:
        """Allow the graphs that these shapes need, so many for each."""
        for kind, calls in shapes.blocks.items():
            self.expected.setdefault(kind, set()).update((number, call) for number in range(graphs) for call in calls)

    def _with_limit(self, kind: type, compiled: Any) -> Any:
        """Wrap a compiled function so that torch's global recompile limit is the limit of class `kind` in each call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.limiting:
                dynamo.recompile_limit = len(self.expected.get(kind, ()))
            return compiled(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside the context an unexpected recompilation and a failed compilation raise RunError."""
        with dynamo.patch(recompile_limit=dynamo.recompile_limit, fail_on_recompile_limit_hit=True):
            self.limiting = True
            try:
                yield
            except FailOnRecompileLimitHit as error:
                limit = dynamo.recompile_limit
                raise RunError(f"compile: a block was compiled for more than the {limit} expected shapes") from error
            except BackendCompilerFailed as error:
                raise RunError(
                    "compile: the compiler of torch.compile failed (--log-level debug shows why); run with compile=none"
                ) from error
            except Unsupported as error:
                raise RunError(
                    "compile: torch.compile cannot trace this network (--log-level debug shows why); "
                    "run with compile=none"
                ) from error
            finally:
                self.limiting = False
