"""Predicts memory, communication, FLOPs and time of the batches that a rank has generated, beside what was measured.

The batches are traced on meta after the run, with the rank's layout, its attention kernel and the rates of the machine.
"""

import statistics
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_gen import log as log_lines
from sglang_gen.backends.comm_log import CommLog, GeneratedBatch
from sglang_gen.backends.native.request import pipeline_of
from sglang_gen.dry_run import machine_rates
from sglang_gen.dry_run.estimate import most_memory, offloaded_stages
from sglang_gen.dry_run.held_weights import mapped_of, weights_of
from sglang_gen.dry_run.machine_rates import Rates
from sglang_gen.dry_run.traces import NetworkTrace, Occupied, StageTrace, trace_text_encoder
from sglang_gen.dry_run.traffic import Stages, encoded_lengths, predict, trace_batch
from sglang_gen.families import text_encoders
from sglang_gen.families.encoder_sizes import COUNT
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Plan

MB = 2**20
UNTRACEABLE = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError)
QUANTITIES = ("memory_mb", "communication_bytes", "flops", "step_ms", "total_ms")
TOKENS_UNLESS_NAMED = 77  # of an encoder whose config does not name its length


@dataclass
class BatchTrace:
    """The stages of one batch on one rank; `texts` has each text encoder with the number of lists that it encodes."""

    batch: GeneratedBatch
    texts: list[tuple[StageTrace, int]]
    networks: Mapping[str, NetworkTrace]
    decoding: StageTrace | None  # None on a rank that does not decode

    @property
    def evaluations(self) -> Counter[int]:
        return Counter(self.batch.kinds)

    def evaluation(self, kind: int) -> StageTrace:
        return self.networks[self.batch.networks[kind]].evaluations[kind]


@dataclass
class Measured:
    """What was measured on this rank. Megabytes are 2**20 bytes; `base_mb` is what the process held before loading."""

    base_mb: float | None
    peak_mb: float | None
    flops: int | None
    step_ms: float | None
    total_ms: float
    threads: int
    reused: bool = False  # whether the weights are in `base_mb`
    effective: Mapping[str, Any] = field(default_factory=dict)


def traced(plan: Plan, mesh: Mesh, batch: GeneratedBatch, kernel: str) -> BatchTrace:
    pipeline = pipeline_of(plan)
    rows, texts = batch.latents[0][0], []
    for name in pipeline.spec.text_encoders:
        component = plan.card.components.get(name)
        if component is None or component.class_name not in COUNT:
            continue
        if text_encoders.takes_length(component):
            lengths = encoded_lengths(pipeline.spec, batch)
        else:
            length = text_encoders.text_config(component).get("max_position_embeddings", TOKENS_UNLESS_NAMED)
            lengths = Counter({length: batch.encoded})
        for length, lists in lengths.items():
            texts.append((trace_text_encoder(plan, name, mesh.axis("tp"), rows, length), lists))
    return BatchTrace(batch, texts, *trace_batch(plan, mesh, batch, kernel))


def compare(plan: Plan, mesh: Mesh, log: CommLog, measured: Mapping[str, Any]) -> tuple[Stages, dict[str, Any]]:
    """The predicted communication by stage, and the entry `predicted` of this rank in the dump.

    `measured` has the fields of `Measured`.
    """
    found = Measured(**measured)
    total_sent = sum(sum(sent.bytes.values()) for sent in log.traffic.values())
    values = {
        "memory_mb": found.peak_mb,
        "communication_bytes": total_sent,
        "flops": found.flops,
        "step_ms": found.step_ms,
        "total_ms": found.total_ms,
    }
    if not log.batches:
        reason = "only batches on the native engine are predicted"
        if plan.backend == "sglang":
            reason = "this rank generated no batch"
        return {}, {"rates": None, **{name: _entry(None, values[name], reason) for name in QUANTITIES}}
    kernel = str(found.effective.get("attention", "sdpa"))
    try:
        batches = [(traced(plan, mesh, batch, kernel), count) for batch, count in log.batches.items()]
    except UNTRACEABLE:  # a text encoder of another library
        log_lines.debug(f"The run cannot be traced on meta:\n{traceback.format_exc()}")
        reason = "a component of this model cannot be traced on the meta device"
        unknown = {name: _entry(None, values[name], reason) for name in QUANTITIES}
        return predict(plan, mesh, log), {"rates": None, **unknown}
    stages = predict(plan, mesh, log, {one.batch: (one.networks, one.decoding) for one, _ in batches})
    rates = machine_rates.of_run(plan, found.threads)
    memory, parts = _memory(plan, batches, rates, found)
    cached = found.effective.get("cache", "none") != "none"
    no_time = _no_time(plan, rates, kernel)
    times = None if no_time or rates is None else _times(plan, batches, rates, kernel)
    slow = no_time or ("the collectives of this machine were not measured" if times is None else None)
    sent = sum(sum(traffic.bytes.values()) for traffic in stages.values())
    entries = {
        "memory_mb": _entry(memory, found.peak_mb, _no_memory(plan, cached, found)) | parts,
        "communication_bytes": _entry(sent, total_sent, None),
        "flops": _entry(_flops(batches), found.flops, None),
        "step_ms": _entry(times and times[0], found.step_ms, slow),
        "total_ms": _entry(times and times[1], found.total_ms, slow),
    }
    return stages, {"rates": machine_rates.facts(rates), **entries}


def _entry(predicted: float | None, measured: float | None, reason: str | None) -> dict[str, Any]:
    """`{predicted, measured, ratio}`, with `reason` if there is no prediction. The ratio is measured / predicted."""
    if reason is not None or predicted is None:
        return {"predicted": None, "measured": _rounded(measured), "ratio": None, "reason": reason or "not measured"}
    ratio = None if measured is None or not predicted else float(f"{measured / predicted:.4g}")
    return {"predicted": _rounded(predicted), "measured": _rounded(measured), "ratio": ratio}


def _rounded(value: float | None) -> float | None:
    return round(value, 3) if isinstance(value, float) else value


def _no_memory(plan: Plan, cached: bool, found: Measured) -> str | None:
    if cached:
        return "the memory of a step cache is not predicted"
    if plan.run.compile.enable_torch_compile:
        return "the memory of the compiler and of compiled code is not predicted"
    return "host memory is not known on this system" if plan.device == "cpu" and found.base_mb is None else None


def _memory(
    plan: Plan, batches: list[tuple[BatchTrace, int]], rates: Rates | None, found: Measured
) -> tuple[float, dict[str, Any]]:
    """Predicted peak in MB, and its parts: the process before loading, weights, libraries, and each stage's peak."""
    first, occupied = batches[0][0], Occupied(plan.device)
    spec = pipeline_of(plan).spec
    weights = weights_of(plan, spec, {name: trace.weights for name, trace in first.networks.items()})
    mapped = mapped_of(plan, spec, {name: trace.built for name, trace in first.networks.items()})
    stages: dict[str, int] = {}
    for one, _ in batches:
        for name, traces in (
            ("text_encoding", [trace for trace, _ in one.texts]),
            ("denoising", [*one.networks.values()]),
            ("decoding", [one.decoding] if one.decoding else []),
        ):
            stages[name] = max([stages.get(name, 0), *map(occupied.stage, traces)])
    if plan.device == "cpu":
        base = found.base_mb or 0.0
        held = {name: 0 if found.reused else size - mapped.get(name, 0) for name, size in weights.items()}
    else:
        base, held = 0.0, weights
    libraries = 0.0
    if rates and plan.device == "cpu":
        libraries = rates.libraries_mb(*_shapes([one for one, _ in batches]), plan.matmul)
    peak = most_memory(held, _as_estimated(stages), offloaded_stages(plan, spec))
    parts = {
        "process": round(base, 2),
        "weights": round(sum(held.values()) / MB, 2),
        "mapped": round(sum(mapped.values()) / MB, 2),
        "libraries": round(libraries, 2),
        "stages": {name: round(size / MB, 2) for name, size in stages.items()},
    }
    return base + libraries + peak / MB, parts


def _shapes(batches: list[BatchTrace]) -> tuple[int, int]:
    """The numbers of products and of convolutions that differ in FLOPs or bytes."""
    stages = [trace for one in batches for trace, _ in one.texts]
    stages += [one.decoding for one in batches if one.decoding]
    stages += [each for one in batches for network in one.networks.values() for each in network.evaluations.values()]
    kernels = [stage.kernels for stage in stages]
    kernels += [network.conditioning_kernels for one in batches for network in one.networks.values()]
    products = {shape for each in kernels for shape in each.products}
    return len(products), len({shape for each in kernels for shape in each.convolutions})


def _as_estimated(stages: Mapping[str, int]) -> dict[str, int]:
    """The stages by the names that the estimate of a dry run gives them."""
    return {"step" if name == "denoising" else name: size for name, size in stages.items()}


def _flops(batches: list[tuple[BatchTrace, int]]) -> int:
    total = 0
    for one, count in batches:
        own = sum(lists * trace.kernels.flops for trace, lists in one.texts)
        own += sum(trace.conditioning_kernels.flops for trace in one.networks.values())
        own += sum(times * one.evaluation(kind).kernels.flops for kind, times in one.evaluations.items())
        own += one.decoding.kernels.flops if one.decoding else 0
        total += count * own
    return total


def _no_time(plan: Plan, rates: Rates | None, kernel: str) -> str | None:
    """Why the times of this run are not predicted."""
    if plan.run.compile.enable_torch_compile or plan.run.compile.cuda_graphs:
        return "the rates are those of kernels that Python launches, and this run is compiled or replays CUDA graphs"
    if rates is None:
        ranks = f" --ranks {plan.here}" if plan.here > 1 else ""
        device = " --device cuda" if plan.device == "cuda" else ""
        return f"not measured on this machine: run sglang perf rates --dtype {plan.dtype}{ranks}{device}"
    return None if f"attention {kernel}" in rates.curves else f"the rate of the attention kernel {kernel} is not known"


def _times(plan: Plan, batches: list[tuple[BatchTrace, int]], rates: Rates, kernel: str) -> tuple[float, float] | None:
    """Milliseconds of the median step, and of encoding, denoising and decoding all batches."""
    steps: list[float] = []
    total = 0.0
    for one, count in batches:

        def seconds(trace: Any, attention: str = "sdpa", matmul: str = "torch") -> float | None:
            computing = rates.seconds(trace.kernels, attention, matmul)
            between = rates.seconds_between_ranks(trace.sent, computing)
            return None if between is None else between + computing

        evaluations = {kind: seconds(one.evaluation(kind), kernel, plan.matmul) for kind in one.evaluations}
        others = [(seconds(trace), lists) for trace, lists in one.texts]
        others += [
            (seconds(StageTrace(sent=trace.conditioning, kernels=trace.conditioning_kernels), kernel, plan.matmul), 1)
            for trace in one.networks.values()
        ]
        others += [(seconds(one.decoding), 1)] if one.decoding else []
        if None in evaluations.values() or any(value is None for value, _ in others):
            return None
        by_step: Counter[int] = Counter()
        for number, kind in zip(one.batch.steps, one.batch.kinds, strict=True):
            by_step[number] += evaluations[kind] or 0.0  # type: ignore[assignment]
        steps += [*by_step.values()] * count
        total += count * (sum(by_step.values()) + sum((value or 0.0) * times for value, times in others))
    total += rates.first_calls_s(*_shapes([one for one, _ in batches]), plan.matmul)
    return 1000 * statistics.median(steps), 1000 * total
