"""DBCache on a diffusers pipeline through the cache-dit library, in that library's own configuration schema."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sglang_gen.backends.options.networks import denoisers
from sglang_gen.errors import UserError, first_line, nearest
from sglang_gen.schema import Cache, CacheMethod
from sglang_gen.types import ModelCard

ELSEWHERE = {
    "parallelism_config": "the group parallel",
    "quantize_config": "the group quant",
    "attention_backend": "the group attention",
}
KINDS: Mapping[type, tuple[Any, str]] = {  # what a key may be whose default is of this type
    bool: ((bool,), "true or false"), int: ((int,), "a whole number"), float: ((int, float), "a number"),
}  # fmt: skip
CALIBRATOR_KEYS = ("calibrator", "enable_calibrator", "enable_taylorseer", "taylorseer_order")


def settings(cache: Cache) -> dict[str, Any]:
    """DBCache's settings by cache-dit's names: the typed keys of the group, over them `cache_dit_config`.

    Raises UserError for an unknown key, and for a section that belongs to another group.
    """
    typed = {
        name: value for name, value in vars(cache).items() if name not in ("method", "cache_dit_config", "interval")
    }
    given = dict(cache.cache_dit_config)
    for section, group in ELSEWHERE.items():
        if section in given:
            raise UserError(f"--cache-dit-config: '{section}' is set by {group}, not here")
    given |= given.pop("cache_config", {})
    legal = [*typed, *CALIBRATOR_KEYS]
    for key, value in given.items():
        if key not in legal:
            raise UserError(f"--cache-dit-config: unknown key '{key}'{nearest(key, legal)}")
        kinds, named = KINDS.get(type(getattr(Cache(), key, None)), ((object, bool), ""))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"--cache-dit-config: '{key}' is {value!r}; it must be {named}")
    if given.pop("enable_taylorseer", False) or given.pop("enable_calibrator", False):
        given.setdefault("calibrator", "taylorseer")
    return {**typed, **given}


def wanted(cache: Cache) -> bool:
    """True where a step cache is asked for, by the group or by the flag."""
    return cache.method is not CacheMethod.none or bool(cache.cache_dit_config)


def check(cache: Cache, card: ModelCard) -> None:
    """Refuse a cache that this model cannot have. Raises UserError."""
    if not wanted(cache):
        return
    if cache.method is CacheMethod.deepcache:
        raise UserError("cache=deepcache: the diffusers backend has no step cache for UNets")
    settings(cache)
    if "transformer" not in card.components:
        raise UserError(f"cache: cache-dit works on transformers; {card.pipeline_class} has a UNet")


class StepCache:
    """cache-dit on one pipeline. It patches the pipeline's class, so `close` must follow."""

    def __init__(self, pipeline: Any, cache: Cache, steps: int) -> None:
        self.pipeline, self.settings = pipeline, settings(cache)
        _check(self.settings, pipeline, steps)
        self._enable()

    def _enable(self) -> None:
        import cache_dit

        values = dict(self.settings)
        kind, order = values.pop("calibrator"), values.pop("taylorseer_order")
        if kind not in (None, "taylorseer"):
            raise UserError(f"cache.calibrator is '{kind}'; it must be null or taylorseer")
        calibrator = None
        if kind:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(
                taylorseer_order=order, enable_encoder_calibrator=_text_leaves(self.pipeline.transformer)
            )
        try:
            cache_dit.enable_cache(
                self.pipeline, cache_config=cache_dit.DBCacheConfig(**values), calibrator_config=calibrator
            )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"cache: cache-dit cannot cache {type(self.pipeline).__name__}: {first_line(error)}"
            ) from error

    def decisions(self, steps: int) -> dict[str, Any]:
        """What the last generation did: per step compute or reuse, and the residual differences that decided."""
        import cache_dit

        stats = cache_dit.summary(self.pipeline.transformer, logging=False)[0]
        reused = {int(step) for step in stats.cached_steps}
        return {
            "steps": ["reuse" if step in reused else "compute" for step in range(steps)],
            "reused": len(reused),
            "residual_diffs": {str(step): float(value) for step, value in stats.residual_diffs.items()},
        }

    def effective(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if value is not None}

    def close(self) -> None:
        import cache_dit

        cache_dit.disable_cache(self.pipeline)


def _check(values: Mapping[str, Any], pipeline: Any, steps: int) -> None:
    """Refuse settings under which nothing would be reused."""
    blocks = sum(_longest(network) for network in denoisers(pipeline).values())
    computed = values["Fn_compute_blocks"] + values["Bn_compute_blocks"]
    if computed >= blocks:
        raise UserError(
            f"cache: Fn_compute_blocks + Bn_compute_blocks = {computed} covers all {blocks} blocks, "
            "so nothing would be reused; lower them"
        )
    mask = values["steps_computation_mask"]
    if mask is not None and len(mask) != steps:
        raise UserError(f"cache: steps_computation_mask has {len(mask)} entries, the run has {steps} steps")


def _text_leaves(network: nn.Module) -> bool:
    """False where the last block drops its text stream (SD3's): there is nothing to extrapolate for it then."""
    blocks = getattr(network, "transformer_blocks", None)
    return not (blocks and getattr(blocks[-1], "context_pre_only", False))


def _longest(network: nn.Module) -> int:
    """Blocks that the cache sees: all repeated blocks at the top of the network."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    return sum(len(blocks) for blocks in lists if blocks and type(blocks[0]).__name__.endswith("Block"))
