"""How the native engine runs a network: attention kernel, compilation and CUDA graphs for the run's shapes."""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_gen.backends.native.build import Built, build
from sglang_gen.engine import attention_autotune, attention_kernels
from sglang_gen.engine.cfg import Encoded, Guidance, guided, kinds
from sglang_gen.engine.denoise import Predict
from sglang_gen.engine.meta_trace import Shapes, trace_on_meta
from sglang_gen.families.contract import Request
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.tensor_tree import to_meta

Predictor = Callable[[Mapping[str, Any], Encoded], Predict]  # (networks by name, encoded texts) -> prediction function


class Execution:
    """Runs a built network: chooses its kernel for the run's shapes, and allows the graphs that a batch needs."""

    def __init__(self, built: Built) -> None:
        self.built, self.plan, self.mesh, self.pipeline = built, built.plan, built.mesh, built.pipeline
        self.name, self.dtype, self.network, self.parallel_network = (
            built.name,
            built.dtype,
            built.network,
            built.parallel,
        )
        self.compiled, self.graphs, self.kernel = built.compiled, built.graphs, built.kernel
        self.settled: set[Any] = set()  # shapes of batches
        self.masked = built.pipeline.spec.masks_text
        self.aligned = False  # whether 128 is known to divide the lengths of a ring's calls
        self.timed = not attention_kernels.timed_by_shape(built.plan)

    @property
    def attention(self) -> Any:
        return self.plan.run.attention

    def time_kernels(self, guidance: Guidance, request: Request, rows: int, others: Sequence["Execution"] = ()) -> None:
        """Choose the kernel that is fastest on the shapes of a batch of `rows` samples, once. Collective.

        The model's `others` networks get the same kernel, so that a record can pin it: their shapes count too. The
        shapes are those of a trace on meta, before anything is encoded, and rank 0 decides for all ranks.
        """
        if self.timed:
            return
        fastest = None
        if self.mesh.rank == 0:
            traces = [each._shapes(guidance, request, rows) for each in (self, *others)]
            shapes = sum((trace.attention for trace in traces), Counter[tuple[Any, ...]]())
            fastest = self._fastest(shapes), attention_kernels.aligned(shapes)
        name, aligned = self.mesh.broadcast(fastest)
        kernel = attention_kernels.named(name)
        for each in (self, *others):
            each.kernel, each.timed, each.aligned = kernel, True, aligned

    def _fastest(self, shapes: Counter[tuple[Any, ...]]) -> str:
        """Name of the fastest kernel; in a ring each is timed as the ring runs it, with its log-sum-exp."""
        names = attention_kernels.candidates(shapes, self.plan.device, self.dtype)
        given = shapes, self.plan.device, self.dtype
        if not self.parallel_network.merges:
            return attention_autotune.fastest({name: attention_kernels.named(name).kernel for name in names}, *given)
        self.aligned = attention_kernels.aligned(shapes)
        summing = {name: kernel for name in names if (kernel := self._summing(name))}
        kernels = {name: attention_kernels.named(name).kernel for name in summing}
        return attention_autotune.fastest(kernels, *given, summing)

    def _shapes(self, guidance: Guidance, request: Request, rows: int) -> Shapes:
        """Shapes of the evaluations of a batch, according to the configurations of the model's components."""
        configs = {name: component.config for name, component in self.plan.card.components.items()}
        steps, config = range(request.steps_run), configs[self.name]
        with torch.device("meta"):
            latents = torch.empty(rows, *self.pipeline.latents_shape(config, request), dtype=self.dtype)
        texts = self.pipeline.empty_texts(configs, request.text_length, rows, self.dtype)

        def evaluate(network: Any) -> None:
            schedule = NetworkSchedule.of_one(network, len(steps))
            prepare = partial(self.pipeline.prepare, schedule, torch.zeros(len(steps)), request)
            encoded = [texts, texts] if guidance.on else [texts]
            predict = guided(prepare, encoded, guidance, steps, self.mesh.axis("cfg"))
            for kind in sorted(set(kinds(guidance, steps))):
                predict(latents, kind)

        return self._trace(evaluate)

    def settle(
        self, predictor: Predictor, kinds: Sequence[int], request: Request, encoded: Encoded, latents: Tensor
    ) -> None:
        """Prepare for evaluating the network on `latents` and `encoded`.

        `kinds` lists this network's evaluations that differ in shape.
        """
        texts = [tuple(tensor.shape) for text in encoded for tensor in text]
        shape = (request.steps_run, tuple(latents.shape), *texts, *kinds)  # a warmup conditions fewer steps
        if shape not in self.settled:
            self._settle(predictor, kinds, request, encoded, latents)
            self.settled.add(shape)

    def _settle(
        self, predictor: Predictor, kinds: Sequence[int], request: Request, encoded: Encoded, latents: Tensor
    ) -> None:
        if not self.settled:
            self._place_kernel(request, encoded)
        if self.compiled is None:
            return
        empty = torch.empty_like(latents, device="meta")

        def evaluate(meta_copy: Any) -> None:
            predict = predictor({self.name: meta_copy}, [to_meta(text) for text in encoded])
            for kind in kinds:
                predict(empty, kind)

        cache = self.built.cache
        self.compiled.expect(self._trace(evaluate), cache.graphs if cache and not self.built.regions else 1)
        for choice in cache.partial_choices(len(latents), len(encoded)) if cache else ():
            self.compiled.expect(self._trace(evaluate, [choice] * (2 * len(kinds))))

    def _place_kernel(self, request: Request, encoded: Encoded) -> None:
        """Set the kernel of all attention ops; a pattern of flex needs the grids of the image tokens."""
        to_text = None
        if self.attention.backend == "flex":
            grids = self.pipeline.grids(self.network.config, request, encoded)
            self.kernel = attention_kernels.choose(self.attention, self.plan.device, self.dtype, grids)
            to_text = torch.nn.functional.scaled_dot_product_attention
        self.parallel_network.set_kernel(self.kernel.kernel, self._summing(self.kernel.name), to_text)

    def _summing(self, name: str) -> Any:
        return attention_kernels.kernel_with_lse(name, self.plan.device, self.dtype, self.masked, self.aligned)

    def _trace(self, evaluate: Callable[[Any], None], choices: Sequence[Hashable] = ()) -> Shapes:
        """Shapes of attention and of compiled blocks (else of the whole network) in `evaluate`.

        `choices` are those of the step cache in the evaluations; it computes everything without them.
        """
        copy = build(self.plan, self.mesh, self.built.name, meta=True)
        if copy.cache is not None and choices:
            copy.cache.repeat(choices)
        return trace_on_meta(copy.parallel, self.built.regions or (type(self.network),), evaluate)

    def countable(self, choice: Hashable = None) -> Any:
        """A meta copy of this rank's network whose matrix products torch's FLOP counter can count.

        With a `choice` of the step cache it leaves out what the evaluation with this choice left out.
        """
        copy = build(self.plan, self.mesh, self.built.name, meta=True)
        if copy.cache is not None and choice is not None:
            copy.cache.repeat([choice])
        meta_copy = copy.parallel
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


def share_graphs(executions: Iterable[Execution]) -> None:
    """Let the networks of a model allow each other's graphs, since torch counts graphs per function of a class."""
    compiled = [execution.compiled for execution in executions if execution.compiled is not None]
    for other in compiled[1:]:
        other.expected = compiled[0].expected


@contextlib.contextmanager
def limits(executions: Iterable[Execution]) -> Iterator[None]:
    """The context of every execution's `limits`."""
    with contextlib.ExitStack() as stack:
        for execution in executions:
            stack.enter_context(execution.limits())
        yield
