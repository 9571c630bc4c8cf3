"""Cache plans: JSON files with the schedule of a planned step cache, written by `sglang tune cache`.

A plan holds for the generation that it was calibrated with. `bound_to` describes that generation, and a run that
differs from it is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_gen.config.schema import Cache, CacheMethod
from sglang_gen.errors import UserError, in_our_words

PLAN_KEY = "cache.plan_file"
FORMAT = "sglang-gen cache plan"
PLAN_VERSION = 1
SAME_TIMESTEP = 0.05  # of 1000; machines round timesteps differently
# What a plan is bound to, as it is named in messages. Values that are digests are not shown.
BINDINGS = {
    "pipeline": "the pipeline",
    "network": "another configuration of the network",
    "weights": "other weights of the network",
    "size": "the size [height, width, frames]",
    "scheduler": "the scheduler",
    "scheduler_config": "another configuration of the scheduler",
    "steps": "sampling.num_inference_steps",
    "timesteps": "the timesteps",
    "dtype": "dtype",
    "guidance_scale": "sampling.guidance_scale",
    "guidance_interval": "sampling.guidance_interval",
    "guidance_arguments": "the --diffusers-kwargs",
}
DIGESTS = ("network", "weights", "scheduler_config")
SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class CachePlan:
    """`depths` has one entry per evaluation of the network: the depth at which it is reused, or None if it computes all
    of its `blocks`. In total `computed_blocks` are computed."""

    bound_to: Mapping[str, Any]
    depths: tuple[int | None, ...]
    blocks: int
    computed_blocks: int


def chosen(cache: Cache) -> bool:
    return cache.method is CacheMethod.planned


def check_planned(cache: Cache) -> None:
    """Raises UserError for a plan without cache=planned, cache=planned without one, and settings of other caches."""
    if not chosen(cache):
        if cache.plan_file is not None:
            raise UserError(f"{PLAN_KEY} is the schedule of cache=planned; add cache=planned or leave it out")
        return
    if cache.plan_file is None:
        raise UserError(f"cache=planned needs {PLAN_KEY}, the file of a schedule that `sglang tune cache` has written")
    for name, usual in vars(Cache()).items():
        if name not in ("method", "plan_file") and getattr(cache, name) != usual:
            raise UserError(f"cache.{name} has no effect with cache=planned, whose plan decides; leave it out")


def read_cache_plan(name: str) -> CachePlan:
    """Raises UserError for a file that cannot be read or is not a cache plan of this version."""
    path = Path(name).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{PLAN_KEY}: {name} cannot be read: {in_our_words(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{PLAN_KEY}: {name} is not a cache plan; `sglang tune cache` writes one")
    version = content.get("schema_version")
    if version != PLAN_VERSION:
        raise UserError(
            f"{PLAN_KEY}: {name} has the version {_shown(version)} of cache plans, and this is {PLAN_VERSION}"
        )
    bound_to, depths = content.get("bound_to"), content.get("depths")
    blocks, computed = content.get("blocks"), content.get("computed_blocks")
    if (
        not isinstance(bound_to, dict)
        or BINDINGS.keys() - bound_to.keys()
        or not isinstance(blocks, int)
        or not isinstance(computed, int)
        or not isinstance(depths, list)
        or not _is_schedule(depths, blocks)
    ):
        raise UserError(f"{PLAN_KEY}: {name} is damaged; write it again with `sglang tune cache`")
    return CachePlan(bound_to, tuple(depths), blocks, computed)


def _is_schedule(depths: list[Any], blocks: int) -> bool:
    """Whether the first step is computed, and every other one computed or reused at a depth of the network."""
    legal = all(depth is None or (type(depth) is int and 0 <= depth < blocks) for depth in depths)
    return legal and depths[:1] == [None]


def check_bound(plan: CachePlan, name: str, facts: Mapping[str, Any]) -> None:
    """Raises UserError for a run that differs from the one of the plan; `facts` describes it by the keys of `BINDINGS`.

    Facts that are None are not known yet.
    """
    for key, meaning in BINDINGS.items():
        expected, found = plan.bound_to[key], facts[key]
        if key == "weights" and None in (expected, found):
            continue  # before the weights are downloaded
        if not _agree(key, expected, found):
            values = "" if key in DIGESTS else f" {_shown(expected)}, and this run has {_shown(found)}"
            raise UserError(
                f"{PLAN_KEY}: {name} was calibrated with {meaning}{values}; calibrate a plan for this run with "
                "`sglang tune cache`"
            )


def _agree(key: str, expected: Any, found: Any) -> bool:
    if key != "timesteps":
        return bool(expected == found)
    return (
        isinstance(expected, list)
        and len(expected) == len(found)
        and all(isinstance(one, int | float) for one in expected)
        and all(abs(one - other) <= SAME_TIMESTEP for one, other in zip(expected, found, strict=True))
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
