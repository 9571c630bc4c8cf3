"""How the native engine executes its network: attention kernel and compiler, settled on the shapes of the run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sglang_gen.engine import attention_autotune, attention_kernels
from sglang_gen.engine.cfg import Encoded
from sglang_gen.engine.cuda_graphs import Graphs
from sglang_gen.engine.denoise import Predict
from sglang_gen.engine.meta_trace import Shapes, trace_on_meta
from sglang_gen.families.contract import Request
from sglang_gen.parallel.collectives import Traffic, counted
from sglang_gen.parallel.sharded_network import ParallelNetwork, Split
from sglang_gen.tensor_tree import to_meta
from sglang_gen.types import Plan

if TYPE_CHECKING:
    from sglang_gen.engine.compile import Compiled

Predictor = Callable[[Any, Encoded], Predict]  # of a network and encoded texts


@dataclass
class Expected:
    """What a rehearsed batch sends: in conditioning, and in an evaluation of each kind."""

    conditioning: Traffic = field(default_factory=Traffic)
    evaluations: dict[int, Traffic] = field(default_factory=dict)


def laid_out(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convolutions of half precision with their channels last, as their kernels want them.

    Float32 keeps the layout in which diffusers rounds: the difference is one of rounding, and it is all there is.
    """
    if dtype.itemsize == 2:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return network


def _compile(network: nn.Module, regions: tuple[type, ...], device: str, ranks: int) -> "Compiled":
    from sglang_gen.engine.compile import Compiled  # imports dynamo, which takes seconds

    return Compiled(network, regions, device, ranks)


class Execution:
    """The kernel goes in before the first block is compiled, compiled blocks before the first graph is captured.

    A batch of another shape allows further graphs.
    """

    def __init__(self, plan: Plan, split: Split, glue: Any, network: nn.Module) -> None:
        """Raises UserError for a kernel that does not run here, or a compiler that is missing."""
        self.plan, self.split, self.mesh, self.glue = plan, split, split.mesh, glue
        self.dtype = getattr(torch, plan.dtype)
        self.network: Any = laid_out(network, self.dtype)
        self.placed = split.parallelize(network)
        self.expected: dict[Any, Expected] = {}  # by the shapes of a batch
        settings = plan.run.compile
        self.regions = glue.REGIONS if settings.regional else ()
        compiles, ranks = settings.enable_torch_compile, self.mesh.layout.ranks
        self.compiled = _compile(network, self.regions, plan.device, ranks) if compiles else None
        self.graphs = Graphs(network) if settings.cuda_graphs else None
        # Chosen here so that it is refused before anything is computed; what waits is chosen again for the shapes.
        self.kernel = attention_kernels.choose(self.attention, plan.device, self.dtype, ())

    @property
    def attention(self) -> Any:
        return self.plan.run.attention

    @property
    def waits(self) -> bool:
        """Whether the kernel depends on the shapes of the run: flex, and auto where it times.

        In float32 auto keeps torch's choice, with which diffusers rounds: guidance makes of other rounding more than
        float32 promises.
        """
        timed = self.attention.backend == "auto" and not self.attention.backend_config and self.plan.dtype != "float32"
        return timed or self.attention.backend == "flex"

    def settle(
        self, predictor: Predictor, kinds: Sequence[int], request: Request, encoded: Encoded, latents: Tensor
    ) -> Expected:
        """Make ready for evaluations of a batch `latents` with these texts. Collective on the first call.

        `kinds` are evaluations that differ in shape.
        """
        texts = [tuple(part.shape) for text in encoded for part in text]
        shape = (request.steps_run, tuple(latents.shape), *texts, *kinds)  # a warmup has fewer steps to condition
        if shape not in self.expected:
            self.expected[shape] = self._settle(predictor, kinds, request, encoded, latents)
        return self.expected[shape]

    def _settle(
        self, predictor: Predictor, kinds: Sequence[int], request: Request, encoded: Encoded, latents: Tensor
    ) -> Expected:
        first = not self.expected
        if not (self.compiled or (first and self.waits) or self.mesh.layout.ranks > 1):
            self._place_kernel()
            return Expected()
        empty = torch.empty_like(latents, device="meta")

        expected = Expected()

        def evaluate(twin: Any) -> None:
            with counted() as expected.conditioning:
                predict = predictor(twin, [to_meta(text) for text in encoded])
            for kind in kinds:
                with counted() as expected.evaluations[kind]:
                    predict(empty, kind)

        shapes = trace_on_meta(self._twin(), self.regions or (type(self.network),), evaluate)
        if first:
            self._set_kernel(shapes, self.glue.grids(self.network.config, request, encoded))
        if self.compiled:
            self.compiled.expect(shapes)
        return expected

    def _set_kernel(self, shapes: Shapes, grids: list[Any]) -> None:
        if self.attention.backend == "flex":
            self.kernel = attention_kernels.choose(self.attention, self.plan.device, self.dtype, grids)
        elif self.waits:
            names = attention_kernels.candidates(shapes.attention, self.plan.device, self.dtype)
            if self.placed.merges:
                names = [name for name in names if self._summing(name)]
            timed = {name: attention_kernels.named(name).kernel for name in names}
            answer = (
                attention_autotune.fastest(timed, shapes.attention, self.plan.device, self.dtype)
                if self.mesh.rank == 0
                else None
            )
            self.kernel = attention_kernels.named(self.mesh.broadcast(answer))
        self._place_kernel()

    def _place_kernel(self) -> None:
        to_text = torch.nn.functional.scaled_dot_product_attention if self.attention.backend == "flex" else None
        self.placed.set_kernel(self.kernel.kernel, self._summing(self.kernel.name), to_text)

    def _summing(self, name: str) -> Any:
        return attention_kernels.kernel_with_lse(name, self.plan.device, self.dtype)

    def _twin(self) -> ParallelNetwork:
        return self.split.meta_copy(lambda: type(self.network)(self.network.config), self.dtype)

    def countable(self) -> Any:
        """What this rank computes, without memory, in products that can be counted."""
        twin = self._twin()
        twin.set_kernel(
            torch.nn.functional.scaled_dot_product_attention,
            attention_kernels.kernel_with_lse("math", "meta", self.dtype),
        )
        return twin.entrance

    @contextlib.contextmanager
    def limits(self) -> Iterator[None]:
        """Inside, the network may be compiled as often as was expected and no oftener."""
        with self.compiled.limited() if self.compiled else contextlib.nullcontext():
            yield

    def effective(self) -> dict[str, Any]:
        compiled = self.compiled.mode if self.compiled else False
        found = {"attention": self.kernel.name, "compile": compiled, "cuda_graphs": self.graphs is not None}
        if self.mesh.size("ring") > 1:  # keys and values: from rank to rank, or all at once
            found["ring"] = "merged" if self.placed.merges and self._summing(self.kernel.name) else "gathered"
        return found
