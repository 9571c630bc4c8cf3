"""DBCache on a diffusers pipeline through the cache-dit library, with that library's configuration schema."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sglang_gen.backends.diffusers.roles import denoisers
from sglang_gen.config.schema import Cache
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.plan.step_cache import check_blocks, check_steps, refuse_covered, settings, wanted
from sglang_gen.types import ModelCard


def check_cache_support(cache: Cache, card: ModelCard, pipeline_class: Any, calls: tuple[int, int]) -> None:
    """Refuse a cache that does not support this model, or that cannot act in `calls` (least, most) network calls.

    Raises UserError.
    """
    if not wanted(cache):
        return
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
        self.pipeline, self.settings = pipeline, settings(cache)
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

    def trace(self, steps: int, images: Sequence[int]) -> list[dict[str, Any]]:
        """The decisions of the last generation. The library decides for all images of a batch together."""
        stats = self._statistics()[0]
        branches = {"conditional": (stats.cached_steps, stats.residual_diffs)}
        if stats.cfg_cached_steps or stats.cfg_residual_diffs:
            branches["unconditional"] = (stats.cfg_cached_steps, stats.cfg_residual_diffs)
        how = "extrapolated" if self.settings["calibrator"] else "reused"
        rows = []
        for branch, (cached, changes) in branches.items():
            reused = {int(step) for step in cached}
            compared = {
                str(step): float(change) for step, change in changes.items() if change >= 0
            }  # below: not compared
            for step in range(steps):
                change = compared.get(str(step))
                threshold = None if change is None else self.settings["residual_diff_threshold"]
                decision = how if step in reused else "computed"
                rows += [
                    {"step": step, "image": image, "branch": branch, "decision": decision, "residual": change,
                     "threshold": threshold}
                    for image in images
                ]  # fmt: skip
        return rows

    def reused(self) -> int:
        """Number of steps that the last generation reused: the largest over all networks and guidance branches."""
        return max(len(steps) for stats in self._statistics() for steps in (stats.cached_steps, stats.cfg_cached_steps))

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
