"""Predicts what one rank sends in a generation: every distinct batch is traced on meta, with the rank's collectives."""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_gen.backends.comm_log import CommLog, Described, GeneratedBatch
from sglang_gen.backends.native.build import build
from sglang_gen.backends.native.request import pipeline_of
from sglang_gen.dry_run.estimate import ranks_of_encoder, trace_decoding
from sglang_gen.engine.caching.cached_chain import CachedChain
from sglang_gen.engine.cfg import guided, kinds
from sglang_gen.engine.meta_trace import trace_on_meta
from sglang_gen.families.contract import Spec
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.parallel.collectives import Axis, Traffic, counted
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.types import Plan

Stages = dict[str, Traffic]


def predict(plan: Plan, mesh: Mesh, log: CommLog) -> Stages:
    """Predicted traffic of this rank in the stages that its log has; empty without a rank to send to.

    The log of the diffusers backend has no batches to predict: what a pipeline sends is only measured.
    """
    total: Stages = {}
    if plan.layout.ranks == plan.layout.dp:  # data parallel groups send nothing while they generate
        return total
    for batch, count in log.batches.items():
        for stage, traffic in _predict(plan, mesh, batch).items():
            if stage in log.traffic:
                total.setdefault(stage, Traffic()).include(traffic, count)
    return total


def _predict(plan: Plan, mesh: Mesh, batch: GeneratedBatch) -> Stages:
    pipeline, dtype, (shape, _) = pipeline_of(plan), getattr(torch, plan.dtype), batch.latents
    decodes = mesh.axis(SEQUENCE).size > 1 and not (mesh.index("cfg") or mesh.index("tp"))
    return {
        "text_encoding": _encoding(plan, pipeline, mesh.axis("tp"), batch, dtype),
        **trace_denoising(plan, pipeline, mesh, batch, dtype),
        "decoding": trace_decoding(pipeline, mesh.axis(SEQUENCE), plan.card, batch.request, shape[0], dtype)[1]
        if decodes
        else Traffic(),
    }


def _encoding(plan: Plan, pipeline: Pipeline, axis: Axis, batch: GeneratedBatch, dtype: torch.dtype) -> Traffic:
    total, rows = Traffic(), batch.latents[0][0]
    from sglang_gen.families import text_encoder_parallel  # imports transformers

    for name in pipeline.spec.text_encoders:
        if name in plan.card.components and ranks_of_encoder(plan, name) > 1:
            for length, lists in _encoded_lengths(pipeline.spec, batch).items():
                encoded = text_encoder_parallel.traffic(plan.card.components[name], axis, dtype, rows, length)
                total.include(encoded, lists)
    return total


def _encoded_lengths(spec: Spec, batch: GeneratedBatch) -> Counter[int]:
    """Numbers of tokens to which lists of texts were padded -> number of these lists."""
    if not spec.masks_text:
        return Counter({spec.tokens(batch.request.text_length): batch.encoded})
    mask = spec.text_masks[0]
    return Counter(branch[mask][0][1] for branch in batch.texts[-batch.encoded :])


def trace_denoising(plan: Plan, pipeline: Pipeline, mesh: Mesh, batch: GeneratedBatch, dtype: torch.dtype) -> Stages:
    """Traffic of conditioning the networks and of all of a batch's evaluations; one of each kind is traced."""
    latents, texts = _empty(batch.latents), [tuple(map(_empty, branch)) for branch in batch.texts]
    stages: Stages = {"conditioning": Traffic(), "denoising": Traffic()}

    choices = batch.choices or ((),) * len(batch.steps)
    evaluations = Counter(zip(kinds(batch.guidance, batch.steps, batch.networks), choices, strict=True))

    def evaluate(name: str, cache: CachedChain | None, network: Any) -> None:
        schedule = NetworkSchedule({name: network}, batch.networks)
        prepare = partial(pipeline.prepare, schedule, torch.zeros(len(batch.steps)), batch.request)
        with counted() as conditioning:
            predict = guided(prepare, texts, batch.guidance, batch.steps, mesh.axis("cfg"))
        stages["conditioning"].include(conditioning)
        for (kind, choice), times in evaluations.items():
            if batch.networks[kind] != name:
                continue
            if cache is not None:
                cache.repeat(choice)
            with counted() as evaluation:
                predict(latents, kind)
            stages["denoising"].include(evaluation, times)

    for name in dict.fromkeys(batch.networks):
        built = build(plan, mesh, name, meta=True)
        trace_on_meta(built.parallel, (), partial(evaluate, name, built.cache))
    return stages


def _empty(tensor: Described) -> Tensor:
    shape, dtype = tensor
    return torch.empty(shape, dtype=dtype, device="meta")
