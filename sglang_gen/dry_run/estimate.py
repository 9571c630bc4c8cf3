"""What a rank of the native engine will hold, send and compute, before anything is loaded.

The network is rehearsed without memory on the meta device, as one rank has it: with the shapes of the run, and the
collectives of its layout. Nothing is measured but what that twin does.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sglang_gen import env
from sglang_gen.backends.native import memory_policy
from sglang_gen.backends.native import vae_parallel as decoders
from sglang_gen.backends.native.request import NativeRequest
from sglang_gen.config.schema import GuidanceBatching, Machine
from sglang_gen.dry_run.encoder_sizes import COUNT
from sglang_gen.dry_run.roofline import Kernels, seconds
from sglang_gen.engine.cfg import Encoded, Guidance, guided
from sglang_gen.engine.meta_trace import rehearse
from sglang_gen.families import autoencoder as autoencoder
from sglang_gen.families.contract import Request
from sglang_gen.models.vae import Autoencoder
from sglang_gen.parallel.collectives import Axis, Traffic, counted
from sglang_gen.parallel.mesh import AXES, SEQUENCE, Mesh, coordinates
from sglang_gen.parallel.sequence_boundary import Sharding, cut
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.perf.flops import stored_bytes
from sglang_gen.plan import layout_limits
from sglang_gen.types import Layout, ModelCard, Plan


@dataclass
class Rehearsal:
    """Of one rank: what a step computes and sends, and the most that is alive at once beside the weights."""

    weights: int  # bytes of the network's part
    alive: int = 0  # bytes
    conditioning: Traffic = field(default_factory=Traffic)
    step: Traffic = field(default_factory=Traffic)
    kernels: Kernels = field(default_factory=lambda: Kernels(fused=False))  # of a step

    @property
    def flops(self) -> int:
        """In a step; a multiplication and an addition are two."""
        return self.kernels.flops


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive, and the most that ever were; `known` are not counted."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self.seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def rehearsal(
    glue: Any,
    split: Split,
    card: ModelCard,
    request: Request,
    rows: int,
    guidance: Guidance,
    dtype: torch.dtype,
    fused: bool = False,
) -> Rehearsal:
    """One rank's conditioning and one guided step of a batch of `rows` pictures; `fused` is what compiled code does."""
    configs = {name: part.config for name, part in card.components.items()}
    config = configs[glue.NETWORK]
    twin = split.twin(lambda: glue.build(config), dtype)
    held = [*twin.network.parameters(), *twin.network.buffers()]
    found = Rehearsal(sum(map(stored_bytes, held)), kernels=Kernels(fused))
    with torch.device("meta"):
        latents = torch.empty(rows, *glue.latents_shape(config, request), dtype=dtype)
        shapes = glue.encoded_shapes(configs, request.text_length)
        texts = tuple(torch.empty(rows, *shape, dtype=dtype) for shape in shapes)
    encoded: Encoded = [texts, texts] if guidance.on else [texts]
    timesteps = torch.zeros(request.steps_run)
    step = guidance.steps.start if guidance.on and guidance.steps else 0

    def evaluate(network: Any) -> None:
        prepare = partial(glue.prepare, network, timesteps, request)
        with counted() as found.conditioning:
            predict = guided(prepare, encoded, guidance, range(request.steps_run), split.mesh.axis("cfg"))
        with counted() as found.step, found.kernels:
            predict(latents, step)

    with Alive([*held, latents, *texts]) as alive:
        rehearse(twin, (), evaluate, found.kernels.attended)
    found.alive = alive.most
    return found


def decoding(
    glue: Any, axis: Axis, card: ModelCard, request: Request, rows: int, dtype: torch.dtype
) -> tuple[int, Traffic]:
    """The most bytes that are alive beside the weights while a batch of `rows` pictures is decoded, and what is sent.

    The ranks of `axis` share the rows of the pictures.
    """
    config = autoencoder.config(card.components["vae"].config)
    with torch.device("meta"):
        vae = decoders.split(Autoencoder(config).to(glue.decoding_dtype(config, dtype)), axis)
        latents = torch.empty(rows, config.channels, *request.latent_size).to(autoencoder.dtype(vae))
    with torch.no_grad(), counted() as sent, Alive([*vae.parameters(), latents]) as alive:
        vae.decode(latents)
    return alive.most, sent


def encoding(glue: Any, card: ModelCard, request: Request, dtype: torch.dtype) -> int:
    """The most bytes that are alive beside the weights while an input picture is encoded, whole on each rank."""
    config = autoencoder.config(card.components["vae"].config)
    with torch.device("meta"):
        vae = Autoencoder(config).to(glue.encoding_dtype(config, dtype))
        pixels = torch.empty(1, config.channels_in, request.height, request.width, dtype=autoencoder.dtype(vae))
    with torch.no_grad(), Alive([*vae.parameters(), pixels]) as alive:
        vae.encode(pixels)
    return int(alive.most)


def busiest(layout: Layout, lengths: Sequence[int]) -> tuple[int, ...]:
    """Ranks of which one does as much as any; `lengths` are the parts of those that share a picture.

    The first, which has the longest part of the text, the one with the largest part of the picture, and the one with
    the largest among those that have neighbours on both sides.
    """
    whole, inner = range(len(lengths)), range(1, len(lengths) - 1)
    shares = {0} | {max(numbers, key=lambda number: lengths[number]) for numbers in (whole, inner) if numbers}
    places = [
        dict.fromkeys(AXES, 0) | dict(zip(("ring", "ulysses"), divmod(n, layout.ulysses), strict=True)) for n in shares
    ]
    return tuple(rank for rank in range(layout.ranks) if coordinates(layout, rank) in places)


def weights_of(plan: Plan, needs: Any, network: int) -> dict[str, int]:
    """Bytes of each component on one rank; the network's are given. T5 is spread over tensor parallel ranks."""
    size = getattr(torch, plan.dtype).itemsize
    found = {}
    for name in needs.required(plan.card):
        part = plan.card.components[name]
        if name == needs.network:
            found[name] = network
        elif part.class_name in COUNT:
            found[name] = COUNT[part.class_name](part.config, _encoder_ranks(plan, name)) * size
            if part.class_name == "T5EncoderModel" and plan.dtype == "float16":
                c = part.config
                found[name] += 2 * c["num_layers"] * c["d_model"] * c["d_ff"]  # `wo` stays in float32
    return found


def _encoder_ranks(plan: Plan, name: str) -> int:
    """Ranks that share a text encoder's weights, as `backends.large_text` divides them."""
    part, tp = plan.card.components[name], plan.layout.tp
    in_file = plan.card.file is not None and name not in plan.run.model.component_paths
    if part.class_name != "T5EncoderModel" or in_file or plan.dtype == "float16":
        return 1
    return tp if all(part.config[key] % tp == 0 for key in ("num_heads", "d_ff")) else 1


def estimate(plan: Plan) -> dict[str, Any]:
    """`{memory, conditioning, step, decoding, prediction}` of one rank; `{reason}` where the engine is not ours.

    Raises UserError for an input picture that cannot be read, or has too few rows for the ranks.
    """
    if plan.backend != "sglang":
        return {"reason": f"not estimated ({plan.backend})"}
    native_request = NativeRequest(plan)
    glue, request, batch = native_request.pipeline, native_request.full_request, max(plan.batches, key=len)
    layout_limits.check_size(plan.run, plan.card, plan.layout, plan.stated_degrees, request.height, request.width)
    negative = any(sample.negative_prompt is not None for each in plan.batches for sample in each)
    together = plan.run.sampling.guidance_batching is not GuidanceBatching.sequential
    guidance = memory_policy.guidance(plan, glue, request, negative, together)
    ranks = busiest(plan.layout, _parts(native_request, request))
    meshes, dtype = [Mesh(plan.layout, rank) for rank in ranks], getattr(torch, plan.dtype)
    splits = [Split(mesh, glue.TENSOR, glue.SHARDING) for mesh in meshes]
    fused = plan.run.compile.enable_torch_compile
    all_found = [rehearsal(glue, split, plan.card, request, len(batch), guidance, dtype, fused) for split in splits]
    found = max(all_found, key=lambda each: sum(each.step.bytes.values()))
    found.alive = max(each.alive for each in all_found)
    found.kernels = max((each.kernels for each in all_found), key=lambda each: each.flops)
    decoded, sent = max(
        (decoding(glue, mesh.axis(SEQUENCE), plan.card, request, len(batch), dtype) for mesh in meshes),
        key=lambda each: sum(each[1].bytes.values()),
    )
    weights = weights_of(plan, native_request.needs, found.weights)
    alive = {"step": found.alive, "decoding": decoded}
    if plan.run.sampling.image_path:
        alive["encoding"] = encoding(glue, plan.card, request, dtype)
    total = sum(weights.values()) + max(alive.values())
    return {
        "memory": {"weights": weights, "alive": alive, "total": total, "there": _there(plan)},
        "conditioning": {"collectives": _listed(found.conditioning)},
        "step": {"flops": found.flops, "collectives": _listed(found.step)},
        "decoding": {"collectives": _listed(sent)},
        "prediction": predicted(plan.run.machine, plan.dtype, found.kernels, sum(found.step.bytes.values())),
    }


def _parts(native_request: NativeRequest, request: Request) -> tuple[int, ...]:
    """How the ranks that share a picture divide it."""
    sharding: Sharding = native_request.pipeline.SHARDING
    size = native_request.pipeline.latents_shape(native_request.config, request)[sharding.dim - 1]
    with torch.device("meta"):
        unit = sharding.unit(native_request.pipeline.build(native_request.config).config)
    return cut(size, unit, native_request.plan.layout.ring * native_request.plan.layout.ulysses)


def _there(plan: Plan) -> int | None:
    """Bytes that this machine has for each rank; None for another machine."""
    if plan.run.machine.name != "auto":
        return None
    return env.memory_bytes(plan.device) // (1 if plan.device == "cuda" else plan.here)


def _listed(traffic: Traffic) -> dict[str, dict[str, int]]:
    return {name: {"count": traffic.calls[name], "bytes": traffic.bytes[name]} for name in sorted(traffic.calls)}


def predicted(machine: Machine, dtype: str, kernels: Kernels, sent: int) -> dict[str, Any] | None:
    """Milliseconds of a step on a named machine, none of which is measured: its kernels, and then what is sent.

    None where no machine is named; `{reason}` where its rates do not hold.
    """
    if machine.name == "auto":
        return None
    rate, memory, link = machine.matmul_tflops, machine.memory_gb_per_s, machine.link_gb_per_s
    if not rate or not memory or (sent and not link):
        return {"reason": f"machine={machine.name} lacks one of matmul_tflops, memory_gb_per_s and link_gb_per_s"}
    if dtype not in ("bfloat16", "float16"):
        return {"reason": f"the rates of machine={machine.name} are those of bfloat16, and this run is {dtype}"}
    parts = {
        "products_ms": seconds(kernels.products, rate, memory),
        "attention_ms": seconds(kernels.attention, machine.attention_tflops or rate, memory),
        "elementwise_ms": kernels.elementwise / (memory * 1e9),
        "communication_ms": sent / (link * 1e9) if sent and link else 0.0,
    }
    rounded = {name: round(1000 * part, 3) for name, part in parts.items()}
    return {"machine": machine.name, **rounded, "step_ms": round(1000 * sum(parts.values()), 3), "measured": False}
