"""The planned step cache of a native run: what its plan must fit, and how it is built."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sglang_gen.backends.native.plan_bindings import bindings
from sglang_gen.engine.caching.planned_cache import PlannedBlocks, PlannedBranches, PlannedCache, Schedule
from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.families.contract import Request, Spec
from sglang_gen.plan import cache_plan
from sglang_gen.plan.guidance import guided_steps
from sglang_gen.types import Plan


def check_planned_cache(plan: Plan, spec: Spec, request: Request, timesteps: Tensor, numbers: Sequence[int]) -> None:
    """Raises UserError for a cache plan of another model or other settings.

    `timesteps` and `numbers` are the timestep and the step of each evaluation.
    """
    name = str(plan.run.cache.plan_file)
    found = cache_plan.read_cache_plan(name)
    cache_plan.check_bound(found, name, bindings(plan, spec, request, timesteps))
    guided, connections = is_guided(plan, request, numbers), skip_connections(plan, spec)
    deepest = max((depth for depth in found.depths if depth is not None), default=0)
    if (
        len(found.depths) != len(guided)
        or not fits_guidance(found.depths, guided)
        or (connections is not None and deepest >= connections)
    ):
        raise UserError(
            f"{cache_plan.PLAN_KEY}: the schedule of {name} does not fit this run; write it again with "
            "`sglang tune cache`"
        )


def skip_connections(plan: Plan, spec: Spec) -> int | None:
    """Number of skip connections of the network; None for a transformer."""
    config = plan.card.components[spec.network].config
    return None if spec.skip_connections is None else spec.skip_connections(config)


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
    return planned_chain(plan, cache_plan.read_cache_plan(str(plan.run.cache.plan_file)).depths)


def planned_chain(plan: Plan, schedule: Schedule) -> PlannedCache:
    """The chain that follows a schedule in the network of a plan."""
    spec = registry.by_pipeline_class(plan.pipeline_class)
    assert spec is not None  # the plan chose the native engine
    return PlannedBlocks(schedule) if spec.skip_connections is None else PlannedBranches(schedule)


def described(plan: Plan) -> dict[str, Any]:
    """The settings of the cache for records."""
    found = cache_plan.read_cache_plan(str(plan.run.cache.plan_file))
    return {
        "method": "planned",
        "schedule": list(found.depths),
        "computed_blocks": found.computed_blocks,
        "blocks": found.blocks * len(found.depths),
    }
