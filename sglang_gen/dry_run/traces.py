"""Traces the stages of a generation on one rank, on the meta device: memory, communication and kernels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sglang_gen.backends.comm_log import Described, GeneratedBatch, described
from sglang_gen.backends.native import vae_parallel as decoders
from sglang_gen.backends.native.build import Built, build, has_channels_last
from sglang_gen.dry_run.heap import Heap
from sglang_gen.dry_run.live_memory import Alive, Event, FusedAttention, workspace_on
from sglang_gen.dry_run.roofline import Kernels
from sglang_gen.engine import freed_memory
from sglang_gen.engine.attention_memory import held_bytes
from sglang_gen.engine.cfg import Guidance, guided
from sglang_gen.engine.memory_format import pixel_values, to_bytes
from sglang_gen.engine.meta_trace import trace_on_meta
from sglang_gen.families import autoencoder, text_encoders
from sglang_gen.families.contract import Request
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.models.vae import Autoencoder
from sglang_gen.parallel.collectives import Axis, Traffic, counted
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf.flops import stored_bytes
from sglang_gen.types import ModelCard, Plan


@dataclass
class StageTrace:
    """A stage, without its weights: peak bytes of live tensors and workspaces, allocations, communication, kernels."""

    alive: int = 0
    events: list[Event] = field(default_factory=list)
    sent: Traffic = field(default_factory=Traffic)
    kernels: Kernels = field(default_factory=lambda: Kernels(fused=False))


@dataclass
class NetworkTrace:
    """One rank's network: its memory, and the kernels and communication of its conditioning and of one denoising step.

    `evaluations` are the steps of all kinds that were traced, by the index of their timestep.
    """

    built: Built = field(repr=False)
    weights: int  # bytes of the rank's weights
    alive: int = 0  # peak bytes of all other tensors and of workspaces
    left: int = 0  # bytes that are alive until the images are decoded: conditioning, texts and latents
    events: list[Event] = field(default_factory=list)  # up to the end of the last step
    again: int = 0  # number of the event from which on the events are those of a step
    conditioning: Traffic = field(default_factory=Traffic)
    conditioning_kernels: Kernels = field(default_factory=lambda: Kernels(fused=False))
    step: Traffic = field(default_factory=Traffic)
    kernels: Kernels = field(default_factory=lambda: Kernels(fused=False))  # kernels of one step
    evaluations: dict[int, StageTrace] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """FLOPs of one step; a multiply-add counts as two."""
        return self.kernels.flops


def trace_network(
    plan: Plan, mesh: Mesh, request: Request, rows: int, guidance: Guidance, name: str | None = None
) -> NetworkTrace:
    """Trace one rank's conditioning and one guided step of a batch of `rows` samples.

    `name` is the denoising network to trace, by default the first.
    """
    built = build(plan, mesh, name, meta=True)
    configs = {key: component.config for key, component in plan.card.components.items()}
    texts = built.pipeline.empty_texts(configs, request.text_length, rows, built.dtype)
    steps = request.steps_run
    batch = GeneratedBatch(
        request,
        guidance,
        steps=tuple(range(steps)),
        networks=(built.name,) * steps,
        texts=(tuple(map(described, texts)),) * (2 if guidance.on else 1),
        encoded=0,
        latents=((rows, *built.pipeline.latents_shape(configs[built.name], request)), built.dtype),
    )
    step = guidance.steps.start if guidance.on and guidance.steps else 0
    return trace_evaluations(built, batch, [step], kernel_of(plan))


def kernel_of(plan: Plan) -> str:
    """The attention kernel of a run that has not started; `auto` is taken for torch's own choice."""
    requested = plan.run.attention.backend
    return "sdpa" if requested == "auto" else requested


def trace_evaluations(built: Built, batch: GeneratedBatch, kinds: Sequence[int], kernel: str) -> NetworkTrace:
    """Trace the conditioning of a batch by the network that was built on meta, and the evaluations `kinds`."""
    plan, mesh, pipeline = built.plan, built.mesh, built.pipeline
    weights = [*built.network.parameters(), *built.network.buffers()]
    fused = plan.run.compile.enable_torch_compile
    trace = NetworkTrace(built, sum(map(stored_bytes, weights)))
    current = trace.conditioning_kernels = Kernels(fused)
    latents, noise = empty(batch.latents), empty(batch.latents)
    texts = [tuple(map(empty, branch)) for branch in batch.texts]

    def add_attention(*tensors: Tensor) -> None:
        current.add_attention(*tensors)

    def evaluate(network: Any) -> None:
        nonlocal current
        schedule = NetworkSchedule({built.name: network}, batch.networks)
        prepare = partial(pipeline.prepare, schedule, torch.zeros(len(batch.steps)), batch.request)
        with counted() as trace.conditioning, current:
            predict = guided(prepare, texts, batch.guidance, batch.steps, mesh.axis("cfg"))
        trace.again = len(alive.events)
        for kind in kinds:
            current = Kernels(fused)
            if built.cache is not None and batch.choices:
                built.cache.repeat(batch.choices[kind])
            with counted() as sent, current:
                predict(latents, kind)
            trace.evaluations[kind] = StageTrace(sent=sent, kernels=current)
        trace.left, trace.events = alive.now, alive.events.copy()  # without what is released now

    with Alive(weights, workspace_on(plan.device, has_channels_last(plan))) as alive:
        for tensor in (latents, noise, *chain.from_iterable(texts)):
            alive.add(tensor)
        trace_on_meta(built.parallel, (), evaluate, add_attention, partial(held_bytes, kernel))
    trace.alive = alive.most
    first = trace.evaluations[kinds[0]]
    trace.step, trace.kernels = first.sent, first.kernels
    return trace


def trace_decoding(
    pipeline: Pipeline, axis: Axis, card: ModelCard, request: Request, rows: int, dtype: torch.dtype, device: str
) -> StageTrace:
    """Trace decoding a batch of `rows` images, to bytes. The ranks of `axis` shard the rows of pixels."""
    config = autoencoder.config(card.components["vae"].config)
    with torch.device("meta"):
        vae = decoders.split(Autoencoder(config).to(pipeline.decoding_dtype(config, dtype)), axis)
        latents = torch.empty(pipeline.autoencoder_shape(config, request, rows), dtype=autoencoder.dtype(vae))
    return _traced(vae, device, lambda: to_bytes(pixel_values(vae.decode(latents))))


def trace_encoding(
    pipeline: Pipeline, card: ModelCard, request: Request, dtype: torch.dtype, device: str
) -> StageTrace:
    """Trace encoding an input image, which every rank encodes completely."""
    config = autoencoder.config(card.components["vae"].config)
    with torch.device("meta"):
        vae = Autoencoder(config).to(pipeline.encoding_dtype(config, dtype))
        sides = (request.size.height, request.size.width)
        pixels = torch.empty(1, config.channels_in, *sides, dtype=autoencoder.dtype(vae))
    return _traced(vae, device, lambda: vae.encode(pixels))


def trace_text_encoder(plan: Plan, name: str, axis: Axis, rows: int, length: int) -> StageTrace:
    """Trace one text encoder on `rows` texts of `length` tokens; of a sharded one this rank's part."""
    from sglang_gen.families import text_encoder_parallel  # imports transformers
    from sglang_gen.hub import component_classes

    component, dtype = plan.card.components[name], getattr(torch, plan.dtype)
    if ranks_of_encoder(plan, name) > 1:
        encoder: Any = text_encoder_parallel.meta_shard(component, dtype, axis)
    else:
        kind = component_classes.named(component)
        with torch.device("meta"):
            encoder = kind(kind.config_class.from_dict(dict(component.config))).to(dtype).eval()
    tokens = torch.zeros(rows, length, dtype=torch.long, device="meta")
    hidden = {} if text_encoders.takes_length(component) else {"output_hidden_states": True}
    return _traced(encoder, plan.device, lambda: encoder(tokens, **hidden))


def ranks_of_encoder(plan: Plan, name: str) -> int:
    """Ranks that share a text encoder's weights; one out of a single file is not sharded."""
    part, tp = plan.card.components[name], plan.layout.tp
    in_file = plan.card.file is not None and name not in plan.run.model.component_paths
    return 1 if in_file else text_encoders.ranks(part, plan.dtype, tp)


def _traced(module: Any, device: str, compute: Callable[[], Any]) -> StageTrace:
    """Trace a call of a module whose weights are on meta, with torch's own attention."""
    trace = StageTrace()
    weights = [*module.parameters(), *module.buffers()]
    with (
        torch.no_grad(),
        counted() as trace.sent,
        Alive(weights, workspace_on(device, channels_last=False)) as alive,
        freed_memory.traced(alive.add_return),
        trace.kernels,
        FusedAttention(trace.kernels.add_attention),
    ):
        compute()
    trace.alive, trace.events = alive.most, alive.events
    return trace


def empty(tensor: Described) -> Tensor:
    shape, dtype = tensor
    return torch.empty(shape, dtype=dtype, device="meta")


class Occupied:
    """Bytes that the stages of a generation take in sequence: on a GPU those of live tensors, on a CPU the heap's."""

    def __init__(self, device: str) -> None:
        self.heap = Heap() if device == "cpu" else None
        self.number = 0  # of the last block
        self.left = 0  # bytes that earlier stages keep on a GPU

    def stage(self, trace: StageTrace | NetworkTrace) -> int:
        """Peak bytes of one stage; a step is repeated, since the second finds the heap as the first left it."""
        if self.heap is None:
            most = self.left + trace.alive
            self.left += trace.left if isinstance(trace, NetworkTrace) else 0
            return most
        most = self.heap.replay(self._renumbered(trace.events))
        if isinstance(trace, NetworkTrace):
            most = max(most, self.heap.replay(self._renumbered(trace.events[trace.again :])))
        return most

    def _renumbered(self, events: Sequence[Event]) -> Iterator[Event]:
        first, self.number = self.number, self.number + max((number for number, _ in events), default=0)
        return ((first + number if number else number, size) for number, size in events)
