"""DBCache on a diffusers pipeline through the cache-dit library, in that library's own configuration schema."""

from typing import Any

from torch import nn

from sglang_gen import log
from sglang_gen.backends.diffusers.roles import denoisers
from sglang_gen.config.schema import Cache, CacheMethod
from sglang_gen.errors import UserError, first_line
from sglang_gen.plan.step_cache import check_blocks, check_steps, refuse_covered, settings, wanted
from sglang_gen.types import ModelCard


def check(cache: Cache, card: ModelCard, pipeline_class: Any, calls: tuple[int, int]) -> None:
    """Refuse a cache that this model cannot have, or that cannot act in so many calls of its network (least, most).

    Raises UserError.
    """
    if not wanted(cache):
        return
    if cache.method is CacheMethod.deepcache:
        raise UserError("cache=deepcache: the diffusers backend has no step cache for UNets")
    if "transformer" not in card.components:
        raise UserError(f"cache: cache-dit works on transformers; {card.pipeline_class} has a UNet")
    import cache_dit

    if not cache_dit.BlockAdapterRegister.is_supported(object.__new__(pipeline_class)):
        raise UserError(f"cache: cache-dit cannot cache {pipeline_class.__name__}; run with cache=none")
    check_blocks(cache, card)
    check_steps(cache, *calls)


class StepCache:
    """cache-dit on one pipeline. It patches the pipeline's class, so `close` must follow."""

    def __init__(self, pipeline: Any, cache: Cache) -> None:
        """Raises UserError for a pipeline that the library cannot cache, and for more blocks than it has."""
        self.pipeline, self.settings, self.warned = pipeline, settings(cache), False
        self._enable()

    def _enable(self) -> None:
        import cache_dit

        values = dict(self.settings)
        kind, order = values.pop("calibrator"), values.pop("taylorseer_order")
        calibrator = None
        if kind:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(
                taylorseer_order=order, enable_encoder_calibrator=_text_leaves(self.pipeline.transformer)
            )
        try:
            refuse_covered(self.settings, _lists(self.pipeline))
            cache_dit.enable_cache(
                self.pipeline, cache_config=cache_dit.DBCacheConfig(**values), calibrator_config=calibrator
            )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"cache: cache-dit cannot cache {type(self.pipeline).__name__}: {first_line(error)}"
            ) from error

    def decisions(self, steps: int) -> dict[str, Any]:
        """What the last generation did: per step compute or reuse, and the residual differences that decided."""
        stats = self._statistics()[0]
        reused = {int(step) for step in stats.cached_steps}
        return {
            "steps": ["reuse" if step in reused else "compute" for step in range(steps)],
            "reused": len(reused),
            "residual_diffs": {str(step): float(value) for step, value in stats.residual_diffs.items()},
        }

    def reused(self) -> int:
        """Steps that the last generation reused, in whichever network and branch of guidance it reused most."""
        return max(len(steps) for each in self._statistics() for steps in (each.cached_steps, each.cfg_cached_steps))

    def warn_idle(self) -> None:
        """Say once that the last generation reused nothing, and what would have to change."""
        if self.warned or self.reused() > 0:
            return
        self.warned = True
        each = [float(value) for stats in self._statistics() for value in stats.residual_diffs.values()]
        near, why = [value for value in each if value > 0], ""
        if near:
            threshold = self.settings["residual_diff_threshold"]
            why = f"; the residual changed by at least {min(near):.3g}, and residual_diff_threshold is {threshold}"
        log.warning(f"cache: no step was reused, so that the cache saved nothing{why}")

    def _statistics(self) -> list[Any]:
        """cache-dit's own, of every list of blocks of every network that it caches."""
        import cache_dit

        networks = denoisers(self.pipeline).values()
        return [stats for network in networks for stats in cache_dit.summary(network, logging=False)]

    def effective(self, generated: bool = False) -> dict[str, Any]:
        """The settings that DBCache was given, and the steps that were reused once it has `generated`."""
        found = {name: value for name, value in self.settings.items() if value is not None}
        return found | ({"reused_steps": self.reused()} if generated else {})

    def close(self) -> None:
        import cache_dit

        cache_dit.disable_cache(self.pipeline)


def _lists(pipeline: Any) -> list[int]:
    """Lengths of the lists of blocks that the library caches, each list for itself."""
    import cache_dit

    adapter = cache_dit.BlockAdapterRegister.get_adapter(pipeline, skip_post_init=True)
    pending, found = [adapter.blocks], []
    while pending:
        blocks = pending.pop()
        if isinstance(blocks, nn.ModuleList):
            found.append(len(blocks))
        elif isinstance(blocks, list):
            pending += blocks
    return found


def _text_leaves(network: nn.Module) -> bool:
    """False where the last block drops its text stream (SD3's): there is nothing to extrapolate for it then."""
    blocks = getattr(network, "transformer_blocks", None)
    return not (blocks and getattr(blocks[-1], "context_pre_only", False))
