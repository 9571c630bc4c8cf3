"""What a plan asks of the native engine's guidance: how strong, in which steps, both branches at once or in turn."""

from dataclasses import dataclass
from typing import Any

import torch

from sglang_gen import log
from sglang_gen.config.schema import GuidanceBatching
from sglang_gen.engine.cfg import Guidance, batch_fits, free_memory
from sglang_gen.errors import UserError
from sglang_gen.families.contract import Request
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.plan.guidance import guided_steps
from sglang_gen.types import Plan


def guidance(plan: Plan, glue: Any, request: Request, negative: bool, batched: bool) -> Guidance:
    """That of a batch with or without negative prompts."""
    interval = plan.run.sampling.guidance_interval
    return Guidance(
        _scale(plan, glue, negative),
        rescale=_number(plan, "guidance_rescale", 0.0),
        steps=None if interval is None else guided_steps(interval, request.steps, request.skipped or 0),
        batched=batched,
    )


@dataclass(frozen=True)
class Room:
    """Whether both branches go through the network at once, and whether the text encoders leave the GPU before that."""

    batched: bool
    released: bool


def room(plan: Plan, glue: Any, network_config: Any, request: Request, encoders: int, mesh: Mesh) -> Room:
    """What the memory that is free after loading allows; `encoders` are the bytes of the text encoders. Collective.

    Where it is short the encoders go first, which costs a copy for each batch, then the branches take turns, which
    costs time in every step.
    """
    free, row = (
        mesh.minimum(free_memory(plan.device)),
        glue.widest_map(network_config, request) * getattr(torch, plan.dtype).itemsize,
    )
    rows, asked = max(map(len, plan.batches)), plan.run.sampling.guidance_batching
    batched = asked is GuidanceBatching.batched
    if asked is GuidanceBatching.auto:
        batched = batch_fits(None if free is None else free + encoders, 2 * rows, row)
    pair = batched and plan.layout.cfg == 1 and guidance(plan, glue, request, _any_negative(plan), batched).on
    return Room(batched, released=not batch_fits(free, 2 * rows if pair else rows, row))


def of_run(plan: Plan, glue: Any, request: Request, batched: bool) -> dict[str, Any]:
    """`effective` of the batches that are guided, where some are."""
    return effective(plan, guidance(plan, glue, request, _any_negative(plan), batched), request)


def effective(plan: Plan, taken: Guidance, request: Request) -> dict[str, Any]:
    """How guidance is computed, and in which of the steps that are run: from the first, without the last."""
    if not taken.on:
        return {"guidance_batching": "none", "guided_steps": None}
    steps = range(request.steps_run) if taken.steps is None else taken.steps
    how = "parallel" if plan.layout.cfg > 1 else "batched" if taken.batched else "sequential"
    return {"guidance_batching": how, "guided_steps": [steps.start, steps.stop]}


def check(plan: Plan, glue: Any, request: Request) -> None:
    """Refuse an interval of which an input picture leaves nothing, and ranks for branches that there are not.

    Raises UserError.
    """
    if plan.layout.cfg > 1 and not guidance(plan, glue, request, _any_negative(plan), True).on:
        reason = glue.UNGUIDED.format(scale=plan.run.sampling.guidance_scale)
        raise UserError(f"parallel.enable_cfg_parallel: {reason}; run with parallel=single or another axis")
    interval = plan.run.sampling.guidance_interval
    if not guided_steps(interval, request.steps, request.skipped or 0):
        raise UserError(
            f"sampling.guidance_interval {interval} lies before the last {request.steps_run} of {request.steps} steps, "
            "which are those that run from this picture"
        )


def warn_ineffective(plan: Plan, glue: Any) -> None:
    """One warning for each setting of guidance where there is none."""
    negative = _any_negative(plan)
    if plan.layout.cfg > 1 and "sampling.guidance_batching" in plan.given:
        log.warning("sampling.guidance_batching has no effect: each branch has a rank of its own")
    if _scale(plan, glue, negative) > 1:
        return
    scale = plan.run.sampling.guidance_scale
    if any(sample.negative_prompt for batch in plan.batches for sample in batch):
        log.warning(glue.INEFFECTIVE_NEGATIVE.format(scale=scale))
    for path in ("sampling.guidance_interval", "sampling.guidance_batching"):
        if path in plan.given:
            log.warning(f"{path} has no effect: {glue.UNGUIDED.format(scale=scale)}")
    for name in ("guidance_rescale",) if negative else ("guidance_rescale", "true_cfg_scale"):
        if _number(plan, name, 0.0) > 0 and name in plan.run.backend.diffusers_kwargs:
            log.warning(f"--diffusers-kwargs: {name} has no effect: {glue.UNGUIDED.format(scale=scale)}")


def _any_negative(plan: Plan) -> bool:
    return any(sample.negative_prompt is not None for batch in plan.batches for sample in batch)


def _scale(plan: Plan, glue: Any, negative: bool) -> float:
    scale: float = glue.guidance_scale(plan.run.sampling.guidance_scale, _number(plan, "true_cfg_scale", 1.0), negative)
    return scale


def _number(plan: Plan, name: str, default: float) -> float:
    """An argument of --diffusers-kwargs that has to be a number."""
    value = plan.run.backend.diffusers_kwargs.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"--diffusers-kwargs: '{name}' is {value!r}; it must be a number")
    return value
