"""Settings of the group cache under cache-dit's names, and checks for invalid settings or ones without any reuse."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sglang_gen.config.schema import Cache, CacheMethod, Run
from sglang_gen.errors import UserError, nearest
from sglang_gen.plan import cache_plan, deep_schedule
from sglang_gen.plan.quantization import denoisers
from sglang_gen.types import ModelCard

CACHE_FLAG = "--cache-dit-config"
FIELDS_SET_ELSEWHERE = {
    "parallelism_config": "the group parallel",
    "quantize_config": "the group quant",
    "attention_backend": "the group attention",
}
# Keys of the group that cache-dit does not have.
FIELDS_OUTSIDE = ("method", "cache_dit_config", "plan_file", *deep_schedule.DEEP_KEYS)
SWITCHES = ("enable_taylorseer", "enable_calibrator")  # cache-dit's alternatives to calibrator=taylorseer
# Keys of cache-dit, each with a predicate for legal values and a description of them.
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "Fn_compute_blocks": (lambda value: _whole(value, 1), "a whole number of at least 1"),
    "Bn_compute_blocks": (lambda value: _whole(value, 0), "a whole number of at least 0"),
    "residual_diff_threshold": (
        lambda value: type(value) in (int, float) and 0 <= value < math.inf,
        "a number of at least 0",
    ),
    "max_accumulated_residual_diff_threshold": (
        lambda value: value is None or (type(value) in (int, float) and 0 < value < math.inf),
        "null or a number above 0",
    ),
    "max_warmup_steps": (lambda value: _whole(value, 0), "a whole number of at least 0"),
    "warmup_interval": (lambda value: _whole(value, 1), "a whole number of at least 1"),
    "max_cached_steps": (lambda value: _limit(value), "a whole number of at least 1, or -1 for no limit"),
    "max_continuous_cached_steps": (lambda value: _limit(value), "a whole number of at least 1, or -1 for no limit"),
    "enable_separate_cfg": (lambda value: value is None or type(value) is bool, "true, false or null"),
    "steps_computation_mask": (
        lambda value: value is None or _mask(value),
        "null or a list with a 1 for each step that is computed, the first among them, and a 0 for each that may reuse",
    ),
    "steps_computation_policy": (lambda value: value in ("dynamic", "static"), "dynamic or static"),
    "calibrator": (lambda value: value in (None, "taylorseer"), "taylorseer or null"),
    "taylorseer_order": (lambda value: _whole(value, 1), "a whole number of at least 1"),
    **{
        name: (lambda value: type(value) is bool, "true or false")
        for name in (*SWITCHES, "cfg_compute_first", "cfg_diff_compute_separate")
    },
    "force_refresh_step_hint": (
        lambda value: value is None or _whole(value, 1),
        "null or a whole number of at least 1",
    ),
    "force_refresh_step_policy": (lambda value: value in ("once", "repeat"), "once or repeat"),
}
# Keys that only --cache-dit-config has, each with the library's default and what it does.
LIBRARY_FIELDS: Mapping[str, tuple[Any, str]] = {
    "cfg_compute_first": (False, "it tells cache-dit which of two calls is the conditional one"),
    "cfg_diff_compute_separate": (True, "false lets one guidance branch decide with the residual of the other"),
    "force_refresh_step_hint": (None, "it empties the cache within a generation, for pipelines of several passes"),
    "force_refresh_step_policy": ("once", "it belongs to force_refresh_step_hint"),
}


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least  # True is an int to isinstance


def _limit(value: Any) -> bool:
    return value == -1 or _whole(value, 1)


def _mask(value: Any) -> bool:
    """Whether `value` is a list of 0 and 1 that starts with 1, because the first step has nothing to reuse."""
    return isinstance(value, list) and all(type(item) is int and item in (0, 1) for item in value) and value[:1] == [1]


def wanted(cache: Cache) -> bool:
    """Whether a step cache is requested, by the group or by the flag."""
    return cache.method is not CacheMethod.none or bool(cache.cache_dit_config)


def is_dbcache(cache: Cache) -> bool:
    """Whether DBCache is requested, whose settings have the names of cache-dit."""
    return wanted(cache) and cache.method not in (CacheMethod.deepcache, CacheMethod.planned)


def check_cache_settings(run: Run) -> None:
    """Raises UserError for settings that are invalid for every model and number of steps."""
    cache_plan.check_planned(run.cache)
    if deep_schedule.chosen(run.cache):
        deep_schedule.check_settings(run.cache)
        for key in ("steps_computation_mask", "steps_computation_policy"):
            _check_value(key, getattr(run.cache, key), {})
    elif is_dbcache(run.cache):
        settings(run.cache)


def settings(cache: Cache) -> dict[str, Any]:
    """DBCache's settings by cache-dit's names: the keys of the group, overridden by `cache_dit_config`.

    Raises UserError for an unknown key or value, and for a section that belongs to another group.
    """
    given = _given(cache.cache_dit_config)
    typed = {name: value for name, value in vars(cache).items() if name not in FIELDS_OUTSIDE}
    for key, value in {**typed, **given}.items():
        if key not in RULES:
            raise UserError(f"{CACHE_FLAG}: unknown key '{key}'{nearest(key, RULES)}")
        _check_value(key, value, given)
    merged = {**typed, **given, **_calibrator(given)}
    if merged["steps_computation_policy"] == "static" and merged["steps_computation_mask"] is None:
        raise UserError(
            f"{_named('steps_computation_policy', given)} is static, which reuses the steps that a mask names; "
            "give steps_computation_mask too, or the policy dynamic"
        )
    return {name: value for name, value in merged.items() if name not in SWITCHES}


def _check_value(key: str, value: Any, given: Mapping[str, Any]) -> None:
    fits, named = RULES[key]
    if not fits(value):
        raise UserError(f"{_named(key, given)} is {_shown(value)}; it must be {named}")


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of --cache-dit-config, at the top level or in the section `cache_config`."""
    for section, group in FIELDS_SET_ELSEWHERE.items():
        if section in config:
            raise UserError(f"{CACHE_FLAG}: '{section}' is set by {group}, not here")
    outer, inner = dict(config), config.get("cache_config", {})
    outer.pop("cache_config", None)
    if not isinstance(inner, Mapping):
        raise UserError(f"{CACHE_FLAG}: 'cache_config' is {_shown(inner)}; it must be a mapping")
    for key in outer.keys() & inner.keys():
        raise UserError(f"{CACHE_FLAG}: '{key}' is given twice, inside of 'cache_config' and beside it; give it once")
    return {str(key): value for key, value in {**outer, **inner}.items()}


def _calibrator(given: Mapping[str, Any]) -> dict[str, Any]:
    """The calibrator set by a switch. Raises UserError if a switch contradicts the key or the other switch."""
    said = [given[name] for name in SWITCHES if name in given]
    if not said:
        return {}
    calibrator = "taylorseer" if any(said) else None
    if given.get("calibrator", calibrator) != calibrator or len(set(said)) > 1:
        names = [name for name in (*SWITCHES, "calibrator") if name in given]
        raise UserError(f"{CACHE_FLAG}: {' and '.join(names)} contradict each other; give one of them")
    return {"calibrator": calibrator}


def refuse_library_fields(given: Mapping[str, Any]) -> None:
    """Raises UserError for a key of cache-dit that the native engine does not have."""
    for name, (usual, meaning) in LIBRARY_FIELDS.items():
        if given.get(name, usual) != usual:
            raise UserError(
                f"{CACHE_FLAG}: '{name}' is not supported by the native engine ({meaning}); leave it out or run with "
                "--backend diffusers"
            )


def _named(key: str, given: Mapping[str, Any]) -> str:
    return f"{CACHE_FLAG}: '{key}'" if key in given else f"cache.{key}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_steps(cache: Cache, least: int, most: int) -> None:
    """Raises UserError if no step of the run can reuse another, or if a mask has another number of steps.

    The network is called `least` to `most` times: pipelines that start from an image differ in their rounding.
    """
    given = settings(cache)
    if most < 2:
        raise UserError("cache: the run has one step and no earlier one to reuse; run more steps or use cache=none")
    mask, warmup, every = given["steps_computation_mask"], given["max_warmup_steps"], given["warmup_interval"]
    if mask is not None and not least <= len(mask) <= most:
        raise UserError(f"cache: steps_computation_mask has {len(mask)} entries, the run has {most} steps")
    if mask is not None:
        computed = {step for step, entry in enumerate(mask) if entry == 1}  # a mask includes its warmup
        cause = "steps_computation_mask computes every step"
    else:
        computed = {0, *range(0, warmup, every)}
        cause = f"the warm-up (max_warmup_steps={warmup}) covers all {most} steps"
    if computed >= set(range(most)):
        raise UserError(f"cache: {cause}, so nothing would be reused; {'give it a 0' if mask else 'lower it'}")
    if given["calibrator"] and given["taylorseer_order"] >= most:
        raise UserError(
            f"cache: taylorseer_order is {given['taylorseer_order']}; with {most} steps it must be 1 to {most - 1}"
        )


def check_blocks(cache: Cache, card: ModelCard) -> None:
    """Raises UserError if all blocks are computed, for networks whose config states the number of blocks."""
    for name in denoisers(card):
        config = card.components[name].config
        if isinstance(config.get("num_layers"), int):
            refuse_covered(settings(cache), [config["num_layers"] + (config.get("num_single_layers") or 0)])


def refuse_covered(given: Mapping[str, Any], lists: list[int]) -> None:
    """Raises UserError if Fn + Bn covers all blocks, or exceeds one of the network's lists of blocks."""
    computed = given["Fn_compute_blocks"] + given["Bn_compute_blocks"]
    if computed >= max(lists):
        raise UserError(
            f"cache: Fn_compute_blocks + Bn_compute_blocks = {computed} covers all {max(lists)} blocks, "
            "so nothing would be reused; lower them"
        )
    if computed > min(lists):
        raise UserError(
            f"cache: Fn_compute_blocks + Bn_compute_blocks = {computed} is more than the {min(lists)} blocks of one of "
            "the network's lists; lower them"
        )


def warnings(run: Run, backend: str) -> list[str]:
    """Warns about settings of a step cache that have no effect because of other settings."""
    if not wanted(run.cache) or cache_plan.chosen(run.cache):
        return []
    if deep_schedule.chosen(run.cache):
        return [*deep_schedule.warnings(run.cache), *_short_warm_up(run)]
    given, usual = settings(run.cache), Cache()
    idle = {}
    static = given["steps_computation_policy"] == "static"
    if static:
        for name in ("residual_diff_threshold", "max_cached_steps", "max_continuous_cached_steps"):
            idle[name] = "with steps_computation_policy=static, which reuses every step that the mask marks with 0"
        if backend == "sglang":
            idle["enable_separate_cfg"] = "with steps_computation_policy=static, which decides alike for all branches"
    if given["calibrator"] is None:
        idle["taylorseer_order"] = "without calibrator=taylorseer"
    found = [
        f"cache: {name} has no effect {reason}" for name, reason in idle.items() if given[name] != getattr(usual, name)
    ]
    if not static and given["residual_diff_threshold"] == 0:
        found.append("cache: residual_diff_threshold=0 reuses no step, so the cache saves nothing")
    return [*found, *deep_schedule.warnings(run.cache), *(_short_warm_up(run) if static else ())]


def _short_warm_up(run: Run) -> list[str]:
    """Warns about a warm-up of one step, which compiles or captures no step that reuses."""
    compiling = run.compile
    whole = compiling.cuda_graphs or (compiling.enable_torch_compile and not compiling.regional)
    if not (compiling.warmup and compiling.warmup_steps < 2 and whole):
        return []
    return [f"compile.warmup_steps={compiling.warmup_steps} warms up no step that reuses; give it 2"]
