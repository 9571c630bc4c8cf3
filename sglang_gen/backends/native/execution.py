"""How the native engine runs its network: attention kernel, compilation and CUDA graphs for the run's shapes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sglang_gen.engine import attention_autotune, attention_kernels
from sglang_gen.engine.cfg import Encoded
from sglang_gen.engine.cuda_graphs import Graphs
from sglang_gen.engine.denoise import Predict
from sglang_gen.engine.meta_trace import Shapes, trace_on_meta
from sglang_gen.families.contract import Request
from sglang_gen.parallel.sharded_network import ParallelNetwork, Split
from sglang_gen.tensor_tree import to_meta
from sglang_gen.types import Plan

if TYPE_CHECKING:
    from sglang_gen.engine.compile import Compiled

Predictor = Callable[[Any, Encoded], Predict]  # (network, encoded texts) -> prediction function


def laid_out(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert convolutions in half precision to channels_last, the memory format that their kernels prefer.

    float32 keeps diffusers' memory format so that rounding matches.
    """
    if dtype.itemsize == 2:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return network


def _compile(network: nn.Module, regions: tuple[type, ...], device: str, ranks: int) -> "Compiled":
    from sglang_gen.engine.compile import Compiled  # imports dynamo, which takes several seconds

    return Compiled(network, regions, device, ranks)


class Execution:
    """The kernel is set before the first block is compiled, and blocks are compiled before the first graph is captured.

    A batch with a new shape allows further graphs.
    """

    def __init__(self, plan: Plan, split: Split, pipeline: Any, network: nn.Module) -> None:
        """Raises UserError for a kernel that does not run on this machine, or if there is no compiler."""
        self.plan, self.split, self.mesh, self.pipeline = plan, split, split.mesh, pipeline
        self.dtype = getattr(torch, plan.dtype)
        self.network: Any = laid_out(network, self.dtype)
        self.parallel_network = split.parallelize(network)
        self.settled: set[Any] = set()  # shapes of batches
        settings = plan.run.compile
        self.regions = pipeline.REGIONS if settings.regional else ()
        compiles, ranks = settings.enable_torch_compile, self.mesh.layout.ranks
        self.compiled = _compile(network, self.regions, plan.device, ranks) if compiles else None
        self.graphs = Graphs(network) if settings.cuda_graphs else None
        # Chosen here so that errors precede all computation; a kernel that waits is chosen again for the shapes.
        self.kernel = attention_kernels.choose(self.attention, plan.device, self.dtype, ())

    @property
    def attention(self) -> Any:
        return self.plan.run.attention

    @property
    def waits(self) -> bool:
        """Whether the kernel depends on the run's shapes: flex, and auto if it times the candidates.

        In float32 auto keeps torch's default kernel, as diffusers does: guidance would amplify other rounding beyond
        the documented float32 tolerance.
        """
        timed = self.attention.backend == "auto" and not self.attention.backend_config and self.plan.dtype != "float32"
        return timed or self.attention.backend == "flex"

    def settle(
        self, predictor: Predictor, kinds: Sequence[int], request: Request, encoded: Encoded, latents: Tensor
    ) -> None:
        """Prepare for evaluating the network on `latents` and `encoded`. Collective on the first call.

        `kinds` lists the evaluations that differ in shape.
        """
        texts = [tuple(tensor.shape) for text in encoded for tensor in text]
        shape = (request.steps_run, tuple(latents.shape), *texts, *kinds)  # a warmup conditions fewer steps
        if shape not in self.settled:
            self._settle(predictor, kinds, request, encoded, latents)
            self.settled.add(shape)

    def _settle(
        self, predictor: Predictor, kinds: Sequence[int], request: Request, encoded: Encoded, latents: Tensor
    ) -> None:
        first = not self.settled
        if not (self.compiled or (first and self.waits)):
            self._place_kernel()
            return
        empty = torch.empty_like(latents, device="meta")

        def evaluate(meta_copy: Any) -> None:
            predict = predictor(meta_copy, [to_meta(text) for text in encoded])
            for kind in kinds:
                predict(empty, kind)

        shapes = trace_on_meta(self._meta_copy(), self.regions or (type(self.network),), evaluate)
        if first:
            self._set_kernel(shapes, self.pipeline.grids(self.network.config, request, encoded))
        if self.compiled:
            self.compiled.expect(shapes)

    def _set_kernel(self, shapes: Shapes, grids: list[Any]) -> None:
        if self.attention.backend == "flex":
            self.kernel = attention_kernels.choose(self.attention, self.plan.device, self.dtype, grids)
        elif self.waits:
            names = attention_kernels.candidates(shapes.attention, self.plan.device, self.dtype)
            if self.parallel_network.merges:
                names = [name for name in names if self._summing(name)]
            timed = {name: attention_kernels.named(name).kernel for name in names}
            fastest = (
                attention_autotune.fastest(timed, shapes.attention, self.plan.device, self.dtype)
                if self.mesh.rank == 0
                else None
            )
            self.kernel = attention_kernels.named(self.mesh.broadcast(fastest))
        self._place_kernel()

    def _place_kernel(self) -> None:
        to_text = torch.nn.functional.scaled_dot_product_attention if self.attention.backend == "flex" else None
        self.parallel_network.set_kernel(self.kernel.kernel, self._summing(self.kernel.name), to_text)

    def _summing(self, name: str) -> Any:
        return attention_kernels.kernel_with_lse(name, self.plan.device, self.dtype)

    def _meta_copy(self) -> ParallelNetwork:
        return self.split.meta_copy(lambda: type(self.network)(self.network.config), self.dtype)

    def countable(self) -> Any:
        """A meta copy of this rank's network whose matrix products torch's FLOP counter can count."""
        meta_copy = self._meta_copy()
        meta_copy.set_kernel(
            torch.nn.functional.scaled_dot_product_attention,
            attention_kernels.kernel_with_lse("math", "meta", self.dtype),
        )
        return meta_copy.entrance

    @contextlib.contextmanager
    def limits(self) -> Iterator[None]:
        """Within this context, compiling the network more often than expected is an error."""
        with self.compiled.limited() if self.compiled else contextlib.nullcontext():
            yield

    def effective(self) -> dict[str, Any]:
        compiled = self.compiled.mode if self.compiled else False
        settings = {"attention": self.kernel.name, "compile": compiled, "cuda_graphs": self.graphs is not None}
        if self.mesh.size("ring") > 1:  # keys and values are passed from rank to rank, or gathered
            merged = self.parallel_network.merges and self._summing(self.kernel.name)
            settings["ring"] = "merged" if merged else "gathered"
        return settings
