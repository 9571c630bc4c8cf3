"""Predicts what one rank sends in a generation: every distinct batch is traced on meta, with the rank's collectives."""

from collections import Counter
from collections.abc import Mapping

import torch

from sglang_gen.backends.comm_log import CommLog, GeneratedBatch
from sglang_gen.backends.native.build import build
from sglang_gen.backends.native.request import pipeline_of
from sglang_gen.dry_run.traces import (
    NetworkTrace,
    StageTrace,
    ranks_of_encoder,
    trace_decoding,
    trace_evaluations,
)
from sglang_gen.families.contract import Spec
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.parallel.collectives import Axis, Traffic
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.types import Plan

Stages = dict[str, Traffic]
Traced = tuple[Mapping[str, NetworkTrace], StageTrace | None]  # of a batch; None on a rank that does not decode


def predict(plan: Plan, mesh: Mesh, log: CommLog, traced: Mapping[GeneratedBatch, Traced] | None = None) -> Stages:
    """Predicted traffic of this rank in the stages that its log has; empty without a rank to send to.

    `traced` has the batches of the log, if they were traced before. The log of the diffusers backend has no batches to
    predict: what a pipeline sends is only measured.
    """
    total: Stages = {}
    if plan.layout.ranks == plan.layout.dp:  # data parallel groups send nothing while they generate
        return total
    for batch, count in log.batches.items():
        networks, decoding = traced[batch] if traced else trace_batch(plan, mesh, batch, "sdpa")
        for stage, traffic in _predict(plan, mesh, batch, networks, decoding).items():
            if stage in log.traffic:
                total.setdefault(stage, Traffic()).include(traffic, count)
    return total


def trace_batch(plan: Plan, mesh: Mesh, batch: GeneratedBatch, kernel: str) -> Traced:
    """Trace one evaluation of each kind of a batch, and its decoding if this rank decodes."""
    pipeline, rows = pipeline_of(plan), batch.latents[0][0]
    networks = {
        name: trace_evaluations(
            build(plan, mesh, name, meta=True),
            batch,
            [kind for kind in dict.fromkeys(batch.kinds) if batch.networks[kind] == name],
            kernel,
        )
        for name in dict.fromkeys(batch.networks)
    }
    if mesh.index("cfg") or mesh.index("tp"):
        return networks, None
    axis = mesh.axis(SEQUENCE)
    return networks, trace_decoding(
        pipeline, axis, plan.card, batch.request, rows, getattr(torch, plan.dtype), plan.device
    )


def _predict(
    plan: Plan, mesh: Mesh, batch: GeneratedBatch, networks: Mapping[str, NetworkTrace], decoding: StageTrace | None
) -> Stages:
    pipeline, dtype = pipeline_of(plan), getattr(torch, plan.dtype)
    stages: Stages = {"conditioning": Traffic(), "denoising": Traffic()}
    evaluations = Counter(batch.kinds)
    for trace in networks.values():
        stages["conditioning"].include(trace.conditioning)
        for kind, evaluation in trace.evaluations.items():
            stages["denoising"].include(evaluation.sent, evaluations[kind])
    return {
        "text_encoding": _encoding(plan, pipeline, mesh.axis("tp"), batch, dtype),
        **stages,
        "decoding": decoding.sent if decoding else Traffic(),
    }


def _encoding(plan: Plan, pipeline: Pipeline, axis: Axis, batch: GeneratedBatch, dtype: torch.dtype) -> Traffic:
    total, rows = Traffic(), batch.latents[0][0]
    from sglang_gen.families import text_encoder_parallel  # imports transformers

    for name in pipeline.spec.text_encoders:
        if name in plan.card.components and ranks_of_encoder(plan, name) > 1:
            for length, lists in encoded_lengths(pipeline.spec, batch).items():
                encoded = text_encoder_parallel.traffic(plan.card.components[name], axis, dtype, rows, length)
                total.include(encoded, lists)
    return total


def encoded_lengths(spec: Spec, batch: GeneratedBatch) -> Counter[int]:
    """Numbers of tokens to which lists of texts were padded -> number of these lists."""
    if not spec.masks_text:
        return Counter({spec.tokens(batch.request.text_length): batch.encoded})
    mask = spec.text_masks[0]
    return Counter(branch[mask][0][1] for branch in batch.texts[-batch.encoded :])
