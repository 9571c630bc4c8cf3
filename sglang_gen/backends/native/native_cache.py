"""The step cache of a native run: what is refused before weights are read, how it is built, and what it reports."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sglang_gen.backends.native import planned_request
from sglang_gen.config.schema import Cache, GuidanceBatching
from sglang_gen.engine.caching.block_cache import BlockCache, Ranks
from sglang_gen.engine.caching.cached_chain import CachedChain
from sglang_gen.engine.caching.decider import Rules
from sglang_gen.engine.caching.deep_cache import DeepCache
from sglang_gen.engine.caching.static_cache import StaticCache
from sglang_gen.errors import UserError
from sglang_gen.families.contract import Request, Spec
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.perf import cache_trace
from sglang_gen.plan import cache_plan, deep_schedule, step_cache
from sglang_gen.types import Plan


def check_native_cache(plan: Plan, spec: Spec, request: Request, timesteps: Tensor, numbers: Sequence[int]) -> None:
    """Refuse a cache that does not fit the model, the evaluations, compilation or guidance.

    `timesteps` and `numbers` are the timestep and the step of each evaluation.

    Raises UserError.
    """
    cache, compiling, networks = plan.run.cache, plan.run.compile, spec.networks_of(plan.card)
    if not step_cache.wanted(cache):
        return
    if len(networks) > 1:
        raise UserError(
            f"cache: {plan.pipeline_class} denoises with {len(networks)} networks ({', '.join(networks)}), and a step "
            "cache supports one; run with cache=none"
        )
    connections = spec.skip_connections
    if cache_plan.chosen(cache):
        planned_request.check_planned_cache(plan, spec, request, timesteps, numbers)
        return
    if deep_schedule.chosen(cache):
        if connections is None:
            raise UserError(
                f"cache=deepcache works on UNets, and {plan.pipeline_class} has a transformer; run with cache=dbcache "
                "or cache=none"
            )
        (network,) = networks
        deep_schedule.check_schedule(cache, connections(plan.card.components[network].config), len(timesteps))
        return
    if connections is not None:
        raise UserError(
            f"cache: DBCache works on the blocks of a transformer, and {plan.pipeline_class} has a UNet; "
            "run with cache=deepcache or cache=none"
        )
    settings = step_cache.settings(cache)
    step_cache.refuse_library_fields(settings)
    step_cache.check_blocks(cache, plan.card)
    step_cache.check_steps(cache, len(timesteps), len(timesteps))
    if rules(cache).dynamic and compiling.cuda_graphs:
        raise UserError(
            "cache: a threshold decides in each step what is computed, which CUDA graphs cannot capture; leave out "
            "compile.cuda_graphs, or use a fixed plan (cache=scm_slow)"
        )
    if rules(cache).dynamic and compiling.enable_torch_compile and not compiling.regional:
        raise UserError(
            "cache: a threshold decides in each step what is computed, which compile=full cannot trace; run with "
            "compile=regional, or use a fixed plan (cache=scm_slow)"
        )
    if settings["enable_separate_cfg"] is False and (
        plan.run.sampling.guidance_batching is GuidanceBatching.sequential
    ):
        raise UserError(
            "cache.enable_separate_cfg=false lets both guidance branches decide together, which needs them in one "
            "call: leave out sampling.guidance_batching=sequential"
        )


def rules(cache: Cache) -> Rules:
    given = step_cache.settings(cache)
    mask = given["steps_computation_mask"]
    return Rules(
        threshold=given["residual_diff_threshold"],
        accumulated=given["max_accumulated_residual_diff_threshold"],
        warmup=given["max_warmup_steps"],
        warmup_interval=given["warmup_interval"],
        mask=None if mask is None else tuple(mask),
        static=given["steps_computation_policy"] == "static",
        most=given["max_cached_steps"],
        most_in_a_row=given["max_continuous_cached_steps"],
    )


def build_cache(plan: Plan, mesh: Mesh) -> CachedChain:
    """The chain of this rank's network, with the cache of the plan."""
    if cache_plan.chosen(plan.run.cache):
        return planned_request.build_planned(plan)
    if deep_schedule.chosen(plan.run.cache):
        return DeepCache(plan.run.cache.branch, partial(deep_schedule.schedule, plan.run.cache))
    given, decides = step_cache.settings(plan.run.cache), rules(plan.run.cache)
    first, last = given["Fn_compute_blocks"], given["Bn_compute_blocks"]
    order = given["taylorseer_order"] if given["calibrator"] else 0
    if not decides.dynamic:
        return StaticCache(decides, first, last, order)
    spread = Ranks(mesh.axis(SEQUENCE), mesh.axis("cfg"), mesh.axis("tp"))
    several = plan.layout.ranks > plan.layout.dp
    return BlockCache(decides, first, last, order, given["enable_separate_cfg"], spread if several else None)


def choices(caches: Iterable[CachedChain], evaluations: int) -> tuple[tuple[Hashable, ...], ...]:
    """What the caches chose in each evaluation of the last generation; empty without caches."""
    taken = [pair for cache in caches for pair in cache.choices]
    if not taken:
        return ()
    return tuple(tuple(choice for at, choice in taken if at == index) for index in range(evaluations))


Trace = Sequence[Mapping[str, Any]]


def effective(plan: Plan, trace: Trace = ()) -> Any:
    """The settings of the cache and, after a generation, the largest number of steps that an image reused."""
    if not step_cache.wanted(plan.run.cache):
        return "none"
    if cache_plan.chosen(plan.run.cache):
        values = planned_request.described(plan)
    else:
        settings = deep_schedule.settings if deep_schedule.chosen(plan.run.cache) else step_cache.settings
        values = {name: value for name, value in settings(plan.run.cache).items() if value is not None}
    return values | ({"reused_steps": cache_trace.reused_steps(trace)} if trace else {})
