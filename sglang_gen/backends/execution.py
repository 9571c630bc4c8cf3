"""How the native engine executes its network: attention kernel and compiler, settled on the shapes of the run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sglang_gen.engine import fastest, kernels
from sglang_gen.engine.denoise import Predict
from sglang_gen.engine.graphs import Graphs
from sglang_gen.engine.guidance import Encoded
from sglang_gen.engine.shapes import Shapes, rehearse
from sglang_gen.nested import to_meta
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.pipelines.request import Request
from sglang_gen.types import Plan

if TYPE_CHECKING:
    from sglang_gen.engine.compile import Compiled

Predictor = Callable[[Any, Encoded], Predict]  # of a network and encoded texts


def laid_out(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convolutions of half precision with their channels last, as their kernels want them.

    Float32 keeps the layout in which diffusers rounds: the difference is one of rounding, and it is all there is.
    """
    if dtype.itemsize == 2:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return network


def _compile(network: nn.Module, regions: tuple[type, ...], device: str) -> "Compiled":
    from sglang_gen.engine.compile import Compiled  # imports dynamo, which takes seconds

    return Compiled(network, regions, device)


class Execution:
    """The kernel goes in before the first block is compiled, compiled blocks before the first graph is captured.

    A batch of another shape allows further graphs.
    """

    def __init__(self, plan: Plan, mesh: Mesh, glue: Any, network: nn.Module) -> None:
        """Raises UserError for a kernel that does not run here, or a compiler that is missing."""
        self.plan, self.mesh, self.glue = plan, mesh, glue
        self.network = laid_out(network, getattr(torch, plan.dtype))
        self.dtype = getattr(torch, plan.dtype)
        settings = plan.run.compile
        self.regions = glue.REGIONS if settings.regional else ()
        self.compiled = _compile(network, self.regions, plan.device) if settings.enable_torch_compile else None
        self.graphs = Graphs(network) if settings.cuda_graphs else None
        # Chosen here so that it is refused before anything is computed; what waits is chosen again for the shapes.
        self.kernel = kernels.choose(self.attention, plan.device, self.dtype, ())
        self.seen: set[Any] = set()

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
    ) -> None:
        """Make ready for evaluations of a batch `latents` with these texts. Collective on the first call.

        `kinds` are evaluations that differ in shape.
        """
        shape = (tuple(latents.shape), *(tuple(part.shape) for text in encoded for part in text))
        if shape in self.seen:
            return
        first, self.seen = not self.seen, self.seen | {shape}
        if not (self.compiled or (first and self.waits)):
            kernels.set_kernel(self.network, self.kernel.kernel)
            return
        empty = torch.empty_like(latents, device="meta")

        def evaluate(twin: nn.Module) -> None:
            predict = predictor(twin, [to_meta(text) for text in encoded])
            for kind in kinds:
                predict(empty, kind)

        shapes = rehearse(self.network, self.regions or (type(self.network),), evaluate)
        if first:
            self._set_kernel(shapes, self.glue.grids(self.network.config, request, encoded))
        if self.compiled:
            self.compiled.expect(shapes)

    def _set_kernel(self, shapes: Shapes, grids: list[Any]) -> None:
        if self.attention.backend == "flex":
            self.kernel = kernels.choose(self.attention, self.plan.device, self.dtype, grids)
        elif self.waits:
            names = kernels.candidates(shapes.attention, self.plan.device, self.dtype)
            timed = {name: kernels.named(name).kernel for name in names}
            answer = (
                fastest.fastest(timed, shapes.attention, self.plan.device, self.dtype) if self.mesh.rank == 0 else None
            )
            self.kernel = kernels.named(self.mesh.share(answer))
        kernels.set_kernel(self.network, self.kernel.kernel)

    @contextlib.contextmanager
    def limits(self) -> Iterator[None]:
        """Inside, the network may be compiled as often as was expected and no oftener."""
        with self.compiled.limited() if self.compiled else contextlib.nullcontext():
            yield

    def effective(self) -> dict[str, Any]:
        compiled = self.compiled.mode if self.compiled else False
        return {"attention": self.kernel.name, "compile": compiled, "cuda_graphs": self.graphs is not None}
