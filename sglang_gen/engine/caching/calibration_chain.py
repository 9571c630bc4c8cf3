"""The chain of a calibration: it records an exact trajectory, and repeats evaluations as if they were reused."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sglang_gen.engine.caching.cached_chain import Conditions, Evaluation
from sglang_gen.engine.caching.planned_cache import PlannedCache
from sglang_gen.models.chain import Block, State


class CalibrationChain(PlannedCache):
    """Computes all blocks unless `source` is set, and keeps the image stream at `depths` for the last `span` steps."""

    def __init__(self, depths: Sequence[int], span: int) -> None:
        super().__init__(())
        self.recorded_depths, self.span = tuple(depths), span
        self.source: tuple[int, int] | None = None  # step and depth from which evaluations are reused
        self.recording = True
        # by branches and step: the streams `[B, L, D]` before the blocks at each depth, and after all blocks
        self.recorded: dict[tuple[tuple[int, ...], int], tuple[dict[int, Tensor], Tensor]] = {}

    def begin(self) -> None:
        super().begin()
        self.recorded = {}

    def end(self) -> None:
        self.recorded = {}

    def evaluated(
        self, evaluation: Evaluation, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        if self.source is not None:
            return (self._reused(evaluation, *self.source), *state[1:])
        if not self.recording:
            return self.chain(blocks, state, conditions, *shared)  # type: ignore[no-any-return]
        *before, after = self.stages(self.recorded_depths, blocks, state, conditions, *shared)
        streams = {depth: stage[0] for depth, stage in zip(self.recorded_depths, before, strict=True)}
        self.recorded[evaluation.branches, evaluation.step] = streams, after[0]
        self.recorded.pop((evaluation.branches, evaluation.step - self.span - 1), None)
        return after

    def _reused(self, evaluation: Evaluation, source: int, depth: int) -> Tensor:
        """The stream after all blocks, if those from `depth` on were reused from the step `source`."""
        now, _ = self.recorded[evaluation.branches, evaluation.step]
        streams, after = self.recorded[evaluation.branches, source]
        return now[depth] + (after - streams[depth])
