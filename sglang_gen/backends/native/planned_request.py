"""The planned step cache of a native run: what its plan must fit, and how it is built."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sglang_gen.backends.native.plan_bindings import bindings
from sglang_gen.engine.caching.planned_cache import PlannedCache
from sglang_gen.errors import UserError
from sglang_gen.families.contract import Request, Spec
from sglang_gen.plan import cache_plan
from sglang_gen.plan.guidance import guided_steps
from sglang_gen.types import Plan


def check_planned_cache(plan: Plan, spec: Spec, request: Request, timesteps: Tensor, numbers: Sequence[int]) -> None:
    """Raises UserError for a cache plan of another model or other settings, and where blocks do not run one by one."""
    check_transformer(plan)
    refuse_whole(plan)
    name = str(plan.run.cache.plan_file)
    found = cache_plan.read_cache_plan(name)
    cache_plan.check_bound(found, name, bindings(plan, spec, request, timesteps))
    guided = is_guided(plan, request, numbers)
    if len(found.depths) != len(guided) or not fits_guidance(found.depths, guided):
        raise UserError(
            f"{cache_plan.KEY}: the schedule of {name} does not fit the guided steps of this run; write it again with "
            "`sglang tune cache`"
        )


def check_transformer(plan: Plan) -> None:
    if "unet" in plan.card.components:
        raise UserError(
            f"cache=planned: {plan.pipeline_class} has a UNet, and the planned cache works on the blocks of a "
            "transformer; run with cache=none"
        )


def refuse_whole(plan: Plan) -> None:
    """Raises UserError where all blocks of an evaluation run as one."""
    compiling = plan.run.compile
    if compiling.cuda_graphs:
        raise UserError("cache=planned: CUDA graphs capture all blocks at once; leave out compile.cuda_graphs")
    if compiling.enable_torch_compile and not compiling.regional:
        raise UserError("cache=planned: compile=full compiles all blocks at once; run with compile=regional")


def is_guided(plan: Plan, request: Request, numbers: Sequence[int]) -> list[bool]:
    """Whether each evaluation lies in the interval of guidance. One outside of it has other rows than one inside."""
    inside = guided_steps(plan.run.sampling.guidance_interval, request.steps, request.skipped or 0)
    return [number in inside for number in numbers]


def fits_guidance(depths: Sequence[int | None], guided: Sequence[bool]) -> bool:
    """Whether every evaluation that is reused has a source that was guided like it."""
    source = guided[0]
    for depth, own in zip(depths, guided, strict=True):
        source = own if depth is None else source
        if own != source:
            return False
    return True


def build_planned(plan: Plan) -> PlannedCache:
    return PlannedCache(cache_plan.read_cache_plan(str(plan.run.cache.plan_file)).depths)


def described(plan: Plan) -> dict[str, Any]:
    """The settings of the cache for records."""
    found = cache_plan.read_cache_plan(str(plan.run.cache.plan_file))
    return {
        "method": "planned",
        "plan_file": plan.run.cache.plan_file,
        "computed_blocks": found.computed_blocks,
        "blocks": found.blocks * len(found.depths),
    }
