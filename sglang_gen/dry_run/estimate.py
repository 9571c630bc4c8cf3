"""Estimates the memory, communication and FLOPs of one rank of the native engine, before anything is loaded.

One rank's network is traced on the meta device, with the shapes of the run and the collectives of its layout. All
numbers come from this trace.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sglang_gen import env
from sglang_gen.backends.native import memory_policy
from sglang_gen.backends.native.request import NativeRequest
from sglang_gen.config.schema import GuidanceBatching, Machine, plain
from sglang_gen.dry_run import machine_rates
from sglang_gen.dry_run.held_weights import weights_of
from sglang_gen.dry_run.roofline import Kernels, seconds
from sglang_gen.dry_run.traces import NetworkTrace, Occupied, kernel_of, trace_decoding, trace_encoding, trace_network
from sglang_gen.families.contract import Request, Spec
from sglang_gen.parallel.collectives import Traffic
from sglang_gen.parallel.mesh import AXES, SEQUENCE, Mesh, coordinates
from sglang_gen.parallel.sequence_boundary import shard_sizes
from sglang_gen.plan import layout_limits, offloading
from sglang_gen.types import Layout, Plan


def busiest(layout: Layout, lengths: Sequence[int]) -> tuple[int, ...]:
    """Ranks that include the one with the most work; `lengths` are the shard sizes of the sequence parallel ranks.

    These are the first rank, which has the longest shard of the text, the rank with the largest shard of the image, and
    the rank with the largest shard among those with neighbours on both sides.
    """
    outer, inner = range(len(lengths)), range(1, len(lengths) - 1)
    shards = {0} | {max(numbers, key=lambda number: lengths[number]) for numbers in (outer, inner) if numbers}
    places = [
        dict.fromkeys(AXES, 0) | dict(zip(("ring", "ulysses"), divmod(n, layout.ulysses), strict=True)) for n in shards
    ]
    return tuple(rank for rank in range(layout.ranks) if coordinates(layout, rank) in places)


_estimates: dict[str, dict[str, Any]] = {}  # by `_estimate_key`
MOST_ESTIMATES = 64  # kept in memory


def estimate(plan: Plan) -> dict[str, Any]:
    """Return `{memory, conditioning, step, decoding, prediction}` of one rank; `{reason}` for the diffusers backend.

    The jobs of a sweep that differ only in what an estimate does not depend on, such as seeds, share one.

    Raises UserError for an input image that cannot be read or has too few rows for the ranks.
    """
    if plan.backend != "sglang":
        return {"reason": "none: only runs on the native engine are estimated"}
    if plan.run.sampling.image_path:  # its size counts, and the file may change
        return _estimate(plan)
    key = _estimate_key(plan)
    if key not in _estimates:
        if len(_estimates) == MOST_ESTIMATES:
            _estimates.clear()
        _estimates[key] = _estimate(plan)
    found = copy.deepcopy(_estimates[key])
    found["memory"]["there"] = _available_memory(plan)
    return found


def _estimate_key(plan: Plan) -> str:
    """All of a plan that an estimate can depend on."""
    run = plain(plan.run)
    for name in ("output", "perf", "quality", "tracking", "sweep", "log_level", "dry_run"):
        del run[name]
    run["sampling"].pop("seed")
    negatives = [[sample.negative_prompt is not None for sample in batch] for batch in plan.batches]
    facts = (plan.card, plan.layout, plan.device, plan.dtype, plan.effective, plan.stated_degrees, plan.here)
    without_seed = tuple({**fact, "seed": None} if fact is plan.effective else fact for fact in facts)
    rates = _rates(plan)
    return repr((run, negatives, without_seed, rates and rates.measured_at))


def _estimate(plan: Plan) -> dict[str, Any]:
    native_request = NativeRequest(plan)
    pipeline, request, batch = native_request.pipeline, native_request.full_request, max(plan.batches, key=len)
    layout_limits.check_size(plan.run, plan.card, plan.layout, plan.stated_degrees, request.size)
    negative = any(sample.negative_prompt is not None for samples in plan.batches for sample in samples)
    together = plan.run.sampling.guidance_batching is not GuidanceBatching.sequential
    guidance = memory_policy.guidance(plan, pipeline.spec.guidance, request, negative, together)
    ranks = busiest(plan.layout, _shard_sizes(native_request, request))
    meshes, dtype = [Mesh(plan.layout, rank) for rank in ranks], getattr(torch, plan.dtype)
    traces = {
        name: _most(trace_network(plan, mesh, request, len(batch), guidance, name) for mesh in meshes)
        for name in pipeline.spec.networks_of(plan.card)
    }
    trace = _most(traces.values())  # a step is computed by one network; that of the most work is shown
    decoding = max(
        (
            trace_decoding(pipeline, mesh.axis(SEQUENCE), plan.card, request, len(batch), dtype, plan.device)
            for mesh in meshes
        ),
        key=lambda one: sum(one.sent.bytes.values()),
    )
    weights = weights_of(plan, pipeline.spec, {name: one.weights for name, one in traces.items()})
    alive, occupied = {}, Occupied(plan.device)
    if plan.run.sampling.image_path:
        alive["encoding"] = occupied.stage(trace_encoding(pipeline, plan.card, request, dtype, plan.device))
    alive["step"] = max(occupied.stage(one) for one in traces.values())
    alive["decoding"] = occupied.stage(decoding)
    total = most_memory(weights, alive, offloaded_stages(plan, pipeline.spec))
    return {
        "memory": {"weights": weights, "alive": alive, "total": total, "there": _available_memory(plan)},
        "conditioning": {"collectives": _collectives(_total(one.conditioning for one in traces.values()))},
        "step": {"flops": trace.flops, "collectives": _collectives(trace.step)},
        "decoding": {"collectives": _collectives(decoding.sent)},
        "prediction": predicted(plan.run.machine, plan.dtype, trace.kernels, trace.step)
        or _by_measured_rates(plan, trace),
    }


def _by_measured_rates(plan: Plan, trace: NetworkTrace) -> dict[str, Any] | None:
    """The same on this machine, by the rates that `sglang perf rates` has kept; None if it has not measured them.

    Compiled code is not predicted: Python launches the kernels that were measured.
    """
    rates = _rates(plan)
    if rates is None or plan.run.compile.enable_torch_compile or plan.run.compile.cuda_graphs:
        return None
    if f"attention {kernel_of(plan)}" not in rates.curves:
        return None
    times = rates.parts(trace.kernels, kernel_of(plan), plan.matmul)
    between = rates.seconds_between_ranks(trace.step, sum(times.values()))
    if between is None:
        return None
    times |= {"communication_ms": between}
    rounded = {name: round(1000 * seconds, 3) for name, seconds in times.items()}
    named = {"machine": "this machine", "measured_at": rates.measured_at}
    return {**named, **rounded, "step_ms": round(1000 * sum(times.values()), 3), "measured": False}


def _rates(plan: Plan) -> machine_rates.Rates | None:
    """Rates of this machine for a run that has not started, whose ranks share the cores of a CPU."""
    return machine_rates.of_run(plan, min(torch.get_num_threads(), max(env.cpu_count() // plan.here, 1)))


def most_memory(weights: Mapping[str, int], alive: Mapping[str, int], offloaded: Mapping[str, str]) -> int:
    """Peak bytes over the stages, of which each has its own tensors and those offloaded components that it uses.

    `offloaded` has the stage of each offloaded component.
    """
    resident = sum(size for name, size in weights.items() if name not in offloaded)

    def on_device(stage: str) -> int:
        return sum(size for name, size in weights.items() if offloaded.get(name) == stage)

    return resident + max(on_device(stage) + alive.get(stage, 0) for stage in {*alive, *offloaded.values()})


def offloaded_stages(plan: Plan, spec: Spec) -> dict[str, str]:
    """Offloaded components and the stage in which each is on the device."""
    options = offloading.active(plan.run, plan.device)
    stages: dict[str, str] = {}
    if "dit_cpu_offload" in options:
        stages |= dict.fromkeys(spec.networks_of(plan.card), "step")
    if "text_encoder_cpu_offload" in options:
        stages |= dict.fromkeys(spec.text_encoders, "text_encoding")
    if "vae_cpu_offload" in options:
        stages["vae"] = "decoding"
    return stages


def _most(traces: Iterable[NetworkTrace]) -> NetworkTrace:
    """The trace that sends most, with the largest memory and the most work of all traces."""
    found = list(traces)
    kernels = max((one.kernels for one in found), key=lambda kernels: kernels.flops)
    most = max(found, key=lambda one: sum(one.step.bytes.values()))
    return replace(most, alive=max(one.alive for one in found), kernels=kernels)


def _total(traffic: Iterable[Traffic]) -> Traffic:
    total = Traffic()
    for each in traffic:
        total.include(each)
    return total


def _shard_sizes(native_request: NativeRequest, request: Request) -> tuple[int, ...]:
    """Sizes of the image's shards on the sequence parallel ranks."""
    sharding = native_request.pipeline.sharding
    size = native_request.pipeline.latents_shape(native_request.config, request)[sharding.dim - 1]
    with torch.device("meta"):
        unit = sharding.unit(native_request.pipeline.build(native_request.config).config)
    return shard_sizes(size, unit, native_request.plan.layout.ring * native_request.plan.layout.ulysses)


def _available_memory(plan: Plan) -> int | None:
    """Bytes of memory that this machine has per rank; None if a machine is named."""
    if plan.run.machine.name != "auto":
        return None
    return env.memory_bytes(plan.device) // (1 if plan.device == "cuda" else plan.here)


def _collectives(traffic: Traffic) -> dict[str, dict[str, int]]:
    return {name: {"count": traffic.calls[name], "bytes": traffic.bytes[name]} for name in sorted(traffic.calls)}


def predicted(machine: Machine, dtype: str, kernels: Kernels, traffic: Traffic) -> dict[str, Any] | None:
    """Predicted milliseconds of one step on a named machine: the sum of its kernels and its communication.

    A collective takes the link's latency and the time of its bytes.

    None if no machine is named; `{reason}` if its rates are incomplete or for another dtype.
    """
    if machine.name == "auto":
        return None
    rate, memory, link = machine.matmul_tflops, machine.memory_gb_per_s, machine.link_gb_per_s
    sent, calls = sum(traffic.bytes.values()), sum(traffic.calls.values())
    if not rate or not memory or (sent and not link):
        return {"reason": f"machine={machine.name} lacks one of matmul_tflops, memory_gb_per_s and link_gb_per_s"}
    if dtype not in ("bfloat16", "float16"):
        return {"reason": f"the rates of machine={machine.name} are those of bfloat16, and this run is {dtype}"}
    times = {
        "products_ms": seconds(kernels.products + kernels.convolutions, rate, memory),
        "attention_ms": seconds(kernels.attention, machine.attention_tflops or rate, memory),
        "elementwise_ms": kernels.elementwise / (memory * 1e9),
        "communication_ms": (sent / (link * 1e9) if sent and link else 0.0)
        + calls * (machine.link_latency_us or 0.0) / 1e6,
    }
    rounded = {name: round(1000 * time, 3) for name, time in times.items()}
    return {"machine": machine.name, **rounded, "step_ms": round(1000 * sum(times.values()), 3), "measured": False}
