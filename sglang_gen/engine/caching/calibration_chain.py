"""The chain of a calibration: it records an exact trajectory, and repeats evaluations as if they were reused."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sglang_gen.engine.caching.cached_chain import CachedChain, Conditions, Evaluation
from sglang_gen.engine.caching.planned_cache import PlannedBlocks, PlannedCache
from sglang_gen.models.chain import Block, State


@dataclass(frozen=True)
class RecordedEvaluation:
    """What later evaluations take from this one, by depth; of a transformer also the image before each depth."""

    taken: dict[int, Tensor]
    before: dict[int, Tensor] = field(default_factory=dict)


class CalibrationChain(CachedChain):
    """Computes all blocks unless `source` is set. `cache` knows what is taken at the `depths`, which ascend."""

    def __init__(self, cache: PlannedCache, depths: Sequence[int], span: int) -> None:
        """Evaluations of the last `span` steps are kept."""
        super().__init__()
        self.cache, self.depths, self.span = cache, tuple(depths), span
        self.source: tuple[int, int] | None = None  # step and depth from which evaluations are reused
        self.recording = True
        self.recorded: dict[tuple[tuple[int, ...], int], RecordedEvaluation] = {}  # by branches and step
        self.costs: dict[int, int] = {}  # number of blocks that a step computes which is reused at a depth

    def begin(self, warming: bool = False) -> None:
        super().begin(warming)
        self.recorded = {}

    def end(self) -> None:
        self.recorded = {}

    def evaluated(
        self, evaluation: Evaluation, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        if self.source is not None:
            return self._reused(evaluation, *self.source, blocks, state, conditions, *shared)
        if not self.recording:
            return self.chain(blocks, state, conditions, *shared)  # type: ignore[no-any-return]
        self.costs = {depth: self.cache.cost(depth, blocks) for depth in self.depths}
        if isinstance(self.cache, PlannedBlocks):
            images, state = self.cache.stages(self.depths, blocks, state, conditions, *shared)
            before = dict(zip(self.depths, images, strict=True))
            recorded = RecordedEvaluation({depth: state[0] - image for depth, image in before.items()}, before)
        else:
            state, taken = self.cache.full(self.depths, blocks, state, conditions, *shared)
            recorded = RecordedEvaluation(dict(zip(self.depths, taken, strict=True)))
        self.recorded[evaluation.branches, evaluation.step] = recorded
        self.recorded.pop((evaluation.branches, evaluation.step - self.span - 1), None)
        return state

    def _reused(
        self,
        evaluation: Evaluation,
        source: int,
        depth: int,
        blocks: Sequence[Block],
        state: State,
        conditions: Conditions,
        *shared: Any,
    ) -> State:
        """The state if the blocks beyond a depth were reused. The first blocks of a transformer are not run again."""
        taken = self.recorded[evaluation.branches, source].taken[depth]
        before = self.recorded[evaluation.branches, evaluation.step].before
        if before:
            return (before[depth] + taken, *state[1:])
        return self.cache.reused(depth, taken, blocks, state, conditions, *shared)
