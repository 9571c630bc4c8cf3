"""DeepCache's settings: which evaluations are full ones, and settings that are invalid or have no effect."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sglang_gen.config.schema import Cache, CacheMethod
from sglang_gen.errors import UserError

# DeepCache's keys of the group, each with a predicate for legal values and a description of them.
DEEP_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "interval": (lambda value: value >= 1, "at least 1"),
    "branch": (lambda value: value >= 0, "at least 0"),
    "center": (lambda value: value is None or value >= 0, "null or at least 0"),
    "power": (lambda value: 1 <= value < math.inf, "at least 1"),
}
SHARED_KEYS = (
    "method",
    "cache_dit_config",
    "steps_computation_mask",
    "steps_computation_policy",
)  # keys of both methods


def chosen(cache: Cache) -> bool:
    return cache.method is CacheMethod.deepcache


def check_settings(cache: Cache) -> None:
    """Raises UserError for values that are invalid for every model and number of steps."""
    if cache.cache_dit_config:
        raise UserError(
            "cache=deepcache has no settings of cache-dit; leave out --cache-dit-config or run with cache=dbcache"
        )
    for key, (fits, legal) in DEEP_KEYS.items():
        value = getattr(cache, key)
        if not fits(value):
            raise UserError(f"cache.{key} is {value}; it must be {legal}")


def settings(cache: Cache) -> dict[str, Any]:
    """The settings that take effect."""
    found: dict[str, Any] = {"method": "deepcache", "branch": cache.branch}
    if cache.steps_computation_mask is not None:
        return found | {"steps_computation_mask": list(cache.steps_computation_mask)}
    found["interval"] = cache.interval
    return found if cache.center is None else found | {"center": cache.center, "power": cache.power}


def schedule(cache: Cache, evaluations: int) -> tuple[int, ...]:
    """A 1 for each evaluation that is computed in full, and a 0 for each that reuses the last full one."""
    if cache.steps_computation_mask is not None:
        return tuple(cache.steps_computation_mask)
    full = set(range(0, evaluations, cache.interval)) if cache.center is None else _around(cache, evaluations)
    return tuple(int(index in full) for index in range(evaluations))


def _around(cache: Cache, evaluations: int) -> set[int]:
    """Full evaluations that are denser around `center`: section 3.3 of the paper, as its authors' code rounds them.

    They are as many as with the interval alone, unless several round to the same one.
    """
    assert cache.center is not None
    count, root = -(-evaluations // cache.interval), 1 / cache.power
    first, last = complex(-cache.center) ** root, complex(evaluations - cache.center) ** root
    spaced = [first + (last - first) * index / count for index in range(1, count)]
    return {0, *(int((each**cache.power).real) + cache.center for each in spaced)}


def check_schedule(cache: Cache, connections: int, evaluations: int) -> None:
    """Raises UserError for a branch that a UNet with so many skip connections lacks, and for an impossible schedule."""
    if cache.branch >= connections:
        raise UserError(
            f"cache.branch is {cache.branch}; this UNet has {connections} skip connections, so it must be 0 to "
            f"{connections - 1}"
        )
    if evaluations < 2:
        raise UserError("cache: the run has one step and no earlier one to reuse; run more steps or use cache=none")
    mask = cache.steps_computation_mask
    if mask is not None and len(mask) != evaluations:
        raise UserError(
            f"cache: steps_computation_mask has {len(mask)} entries, the run evaluates the UNet {evaluations} times"
        )
    if mask is not None and all(mask):
        raise UserError("cache: steps_computation_mask computes every step, so nothing would be reused; give it a 0")
    if mask is None and cache.center is not None:
        _check_center(cache, evaluations)


def _check_center(cache: Cache, evaluations: int) -> None:
    assert cache.center is not None
    if cache.center >= evaluations:
        raise UserError(
            f"cache.center is {cache.center}; the run evaluates the UNet {evaluations} times, so it must be 0 to "
            f"{evaluations - 1}"
        )
    found, wanted = sum(schedule(cache, evaluations)), -(-evaluations // cache.interval)
    if found < wanted:
        raise UserError(
            f"cache.power={cache.power} puts {wanted} full steps on {found} different ones; lower it or raise "
            "cache.interval"
        )


def warnings(cache: Cache) -> list[str]:
    """Warns about settings that have no effect because of other settings."""
    usual, idle = Cache(), {}
    if not chosen(cache):
        idle = dict.fromkeys(DEEP_KEYS, "without cache=deepcache")
    elif cache.steps_computation_mask is not None:
        idle = dict.fromkeys(("interval", "center", "power"), "with steps_computation_mask, which names the steps")
    elif cache.center is None:
        idle = {"power": "without center"}
    if chosen(cache):
        idle |= dict.fromkeys(
            (name for name in vars(usual) if name not in (*DEEP_KEYS, *SHARED_KEYS)), "with cache=deepcache"
        )
    found = [f"cache: {name} has no effect {why}" for name, why in idle.items() if _given(cache, name)]
    if chosen(cache) and cache.steps_computation_policy == "static" and cache.steps_computation_mask is None:
        found.append("cache: steps_computation_policy has no effect without steps_computation_mask")
    if chosen(cache) and cache.interval == 1 and cache.steps_computation_mask is None:
        found.append("cache: interval=1 computes every step in full, so nothing is reused")
    return found


def _given(cache: Cache, name: str) -> bool:
    return bool(getattr(cache, name) != getattr(Cache(), name))
