"""DBCache on a diffusers pipeline through the cache-dit library, with that library's configuration schema."""

from typing import Any

from torch import nn

from sglang_gen import log
from sglang_gen.backends.diffusers.roles import denoisers
from sglang_gen.config.schema import Cache, CacheMethod
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.plan.step_cache import check_blocks, check_steps, idle_sentence, refuse_covered, settings, wanted
from sglang_gen.types import ModelCard


def check_cache_support(cache: Cache, card: ModelCard, pipeline_class: Any, calls: tuple[int, int]) -> None:
    """Refuse a cache that does not support this model, or that cannot act in `calls` (least, most) network calls.

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
    """cache-dit on one pipeline. It patches the pipeline's class; `close` undoes that."""

    def __init__(self, pipeline: Any, cache: Cache) -> None:
        """Raises UserError for a pipeline that cache-dit cannot cache, or if more blocks are set than it has."""
        self.pipeline, self.settings, self.warned = pipeline, settings(cache), False
        self._enable()

    def _enable(self) -> None:
        import cache_dit

        values = dict(self.settings)
        kind, order = values.pop("calibrator"), values.pop("taylorseer_order")
        calibrator = None
        if kind:
            with_text = self.settings["Bn_compute_blocks"] > 0 or _returns_text(self.pipeline.transformer)
            calibrator = cache_dit.TaylorSeerCalibratorConfig(
                taylorseer_order=order, enable_encoder_calibrator=with_text
            )
        try:
            refuse_covered(self.settings, _lists(self.pipeline))
            cache_dit.enable_cache(
                self.pipeline, cache_config=cache_dit.DBCacheConfig(**values), calibrator_config=calibrator
            )
        except UserError:  # a ValueError too: its sentence is whole
            raise
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(
                f"cache: cache-dit cannot cache {type(self.pipeline).__name__}: {in_our_words(error)}"
            ) from error

    def decisions(self, steps: int) -> dict[str, Any]:
        """Per step of the last generation, compute or reuse, and the residual differences behind the decisions."""
        stats = self._statistics()[0]
        reused = {int(step) for step in stats.cached_steps}
        return {
            "steps": ["reuse" if step in reused else "compute" for step in range(steps)],
            "reused": len(reused),
            "residual_diffs": {str(step): float(value) for step, value in stats.residual_diffs.items()},
        }

    def reused(self) -> int:
        """Number of steps that the last generation reused: the largest over all networks and guidance branches."""
        return max(len(steps) for stats in self._statistics() for steps in (stats.cached_steps, stats.cfg_cached_steps))

    def warn_idle(self) -> None:
        """Warn once if the last generation reused no step, with the threshold that would have allowed it."""
        if self.warned or self.reused() > 0:
            return
        self.warned = True
        changes = [float(value) for stats in self._statistics() for value in stats.residual_diffs.values()]
        log.warning(idle_sentence(changes, self.settings))

    def _statistics(self) -> list[Any]:
        """cache-dit's statistics for every list of blocks of every cached network."""
        import cache_dit

        networks = denoisers(self.pipeline).values()
        return [stats for network in networks for stats in cache_dit.summary(network, logging=False)]

    def effective(self, generated: bool = False) -> dict[str, Any]:
        """The settings passed to DBCache and, if `generated`, the number of steps that were reused."""
        values = {name: value for name, value in self.settings.items() if value is not None}
        return values | ({"reused_steps": self.reused()} if generated else {})

    def close(self) -> None:
        import cache_dit

        cache_dit.disable_cache(self.pipeline)


def _lists(pipeline: Any) -> list[int]:
    """Lengths of the lists of blocks that cache-dit caches."""
    import cache_dit

    adapter = cache_dit.BlockAdapterRegister.get_adapter(pipeline, skip_post_init=True)
    pending, lengths = [adapter.blocks], []
    while pending:
        blocks = pending.pop()
        if isinstance(blocks, nn.ModuleList):
            lengths.append(len(blocks))
        elif isinstance(blocks, list):
            pending += blocks
    return lengths


def _returns_text(network: nn.Module) -> bool:
    """False if the last block discards the text stream, so that there is nothing to extrapolate for it."""
    blocks = getattr(network, "transformer_blocks", None)
    return not (blocks and getattr(blocks[-1], "context_pre_only", False))
