"""Guidance of a native run, and whether its branches and text encoders fit in GPU memory at once."""

from dataclasses import dataclass
from typing import Any

import torch

from sglang_gen import log
from sglang_gen.config.schema import GuidanceBatching
from sglang_gen.engine.cfg import Guidance, batch_fits, free_memory
from sglang_gen.errors import UserError
from sglang_gen.families.contract import GuidanceKind, Request
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.plan.guidance import guided_steps
from sglang_gen.types import Plan


def guidance(plan: Plan, kind: GuidanceKind, request: Request, negative: bool, batched: bool) -> Guidance:
    """Guidance of a batch with or without negative prompts."""
    interval = plan.run.sampling.guidance_interval
    return Guidance(
        _scale(plan, kind, negative),
        rescale=_number(plan, "guidance_rescale", 0.0),
        steps=None if interval is None else guided_steps(interval, request.steps, request.skipped or 0),
        batched=batched,
    )


@dataclass(frozen=True)
class MemoryPolicy:
    """`batched`: both guidance branches are evaluated at once; `released`: text encoders leave the GPU before that."""

    batched: bool
    released: bool


def choose(
    plan: Plan, pipeline: Pipeline, request: Request, encoder_bytes: int, offloaded_bytes: int, mesh: Mesh
) -> MemoryPolicy:
    """Choose by the memory that is free after loading. Collective.

    `encoder_bytes` is the size of the text encoders on the device, `offloaded_bytes` that of the networks that come to
    it for denoising. If memory is short, the text encoders are offloaded first, which costs an upload for each batch.
    If it still is, the branches are evaluated one after the other, which costs time in every step.
    """
    configs = [plan.card.components[name].config for name in pipeline.spec.networks_of(plan.card)]
    widest = max(pipeline.widest_map(config, request) for config in configs)
    free, row = mesh.minimum(_free(plan.device, offloaded_bytes)), widest * getattr(torch, plan.dtype).itemsize
    rows, requested = max(map(len, plan.batches)), plan.run.sampling.guidance_batching
    batched = requested is GuidanceBatching.batched
    if requested is GuidanceBatching.auto:
        batched = batch_fits(None if free is None else free + encoder_bytes, 2 * rows, row)
    pair = (
        batched
        and plan.layout.cfg == 1
        and guidance(plan, pipeline.spec.guidance, request, _any_negative(plan), batched).on
    )
    return MemoryPolicy(batched, released=not batch_fits(free, 2 * rows if pair else rows, row))


def _free(device: str, offloaded_bytes: int) -> int | None:
    free = free_memory(device)
    return None if free is None else free - offloaded_bytes


def of_run(plan: Plan, kind: GuidanceKind, request: Request, batched: bool) -> dict[str, Any]:
    """`effective` for the batches with guidance, if there are any."""
    return effective(plan, guidance(plan, kind, request, _any_negative(plan), batched), request)


def effective(plan: Plan, guidance: Guidance, request: Request) -> dict[str, Any]:
    """How guidance is computed, and the half-open range of guided steps among the steps that are run."""
    if not guidance.on:
        return {"guidance_batching": "none", "guided_steps": None}
    steps = range(request.steps_run) if guidance.steps is None else guidance.steps
    how = "parallel" if plan.layout.cfg > 1 else "batched" if guidance.batched else "sequential"
    return {"guidance_batching": how, "guided_steps": [steps.start, steps.stop]}


def check_guidance_plan(plan: Plan, kind: GuidanceKind, request: Request) -> None:
    """Refuse an interval that lies in the steps an input image skips, and CFG parallelism without guidance.

    Raises UserError.
    """
    if plan.layout.cfg > 1 and not guidance(plan, kind, request, _any_negative(plan), True).on:
        reason = kind.unguided.format(scale=plan.run.sampling.guidance_scale)
        raise UserError(f"parallel.enable_cfg_parallel: {reason}; run with parallel=single or another axis")
    interval = plan.run.sampling.guidance_interval
    if not guided_steps(interval, request.steps, request.skipped or 0):
        raise UserError(
            f"sampling.guidance_interval {interval} lies before the last {request.steps_run} of {request.steps} steps, "
            "which are the steps that run with this input image"
        )


def warn_ineffective(plan: Plan, kind: GuidanceKind) -> None:
    """Warn about each guidance setting that the user gave for a run without guidance."""
    negative = _any_negative(plan)
    if plan.layout.cfg > 1 and "sampling.guidance_batching" in plan.given:
        log.warning("sampling.guidance_batching has no effect: each guidance branch runs on its own rank")
    if _scale(plan, kind, negative) > 1:
        return
    scale = plan.run.sampling.guidance_scale
    if any(sample.negative_prompt for batch in plan.batches for sample in batch):
        log.warning(kind.ineffective_negative.format(scale=scale))
    for path in ("sampling.guidance_interval", "sampling.guidance_batching"):
        if path in plan.given:
            log.warning(f"{path} has no effect: {kind.unguided.format(scale=scale)}")
    for name in ("guidance_rescale",) if negative else ("guidance_rescale", "true_cfg_scale"):
        if _number(plan, name, 0.0) > 0 and name in plan.run.backend.diffusers_kwargs:
            log.warning(f"--diffusers-kwargs: {name} has no effect: {kind.unguided.format(scale=scale)}")


def _any_negative(plan: Plan) -> bool:
    return any(sample.negative_prompt is not None for batch in plan.batches for sample in batch)


def _scale(plan: Plan, kind: GuidanceKind, negative: bool) -> float:
    return kind.scale(plan.run.sampling.guidance_scale, _number(plan, "true_cfg_scale", 1.0), negative)


def _number(plan: Plan, name: str, default: float) -> float:
    """A numeric argument of --diffusers-kwargs. Raises UserError if it is not a number."""
    value = plan.run.backend.diffusers_kwargs.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"--diffusers-kwargs: '{name}' is {value!r}; it must be a number")
    return value
