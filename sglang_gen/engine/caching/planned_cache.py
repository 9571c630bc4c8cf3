"""A step cache with a fixed schedule, which says how many first blocks an evaluation computes if not all of them.

An evaluation that is reused at depth d computes the first d blocks and adds the residual of the others, on the image
stream, from the last evaluation that was computed. All images, branches and ranks do the same.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from sglang_gen.engine.caching.cached_chain import BRANCHES, CachedChain, Conditions, Decision, Evaluation
from sglang_gen.models.chain import Block, State

Schedule = tuple[int | None, ...]  # for each evaluation the depth at which it is reused; None if it is computed


@dataclass(frozen=True)
class PlannedChoice:
    """What an evaluation did; `depth` is None if it was computed."""

    depth: int | None


class PlannedCache(CachedChain):
    """Runs the blocks of a transformer, whose state is the image `[B, L, D]` and the text `[B, T, D]`."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.depths = schedule, depths_after(schedule)
        self.kept: dict[tuple[int, ...], dict[int, Tensor]] = {}  # branches -> depth -> residual of the later blocks

    def begin(self) -> None:
        super().begin()
        self.kept = {}

    def end(self) -> None:
        self.kept = {}

    def evaluated(
        self, evaluation: Evaluation, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        depth = self._depth(evaluation)
        self.choice = PlannedChoice(depth)
        how = "computed" if depth is None else "reused"
        self.decisions += [
            Decision(evaluation.step, image, BRANCHES[branch], how)
            for branch in evaluation.branches
            for image in range(evaluation.images)
        ]
        if depth is not None:
            residual = self.kept[evaluation.branches][depth]
            state = self.chain(blocks[:depth], state, conditions[:depth], *shared)
            return (state[0] + residual, *state[1:])
        depths = self.depths[evaluation.step] if evaluation.step < len(self.depths) else ()
        *before, after = self.stages(depths, blocks, state, conditions, *shared)
        self.kept[evaluation.branches] = {
            depth: after[0] - stage[0] for depth, stage in zip(depths, before, strict=True)
        }
        return after

    def _depth(self, evaluation: Evaluation) -> int | None:
        """The depth of an evaluation. A warm-up runs fewer steps than the schedule has, guided at other places."""
        depth = self.schedule[evaluation.step] if evaluation.step < len(self.schedule) else None
        return depth if depth in self.kept.get(evaluation.branches, ()) else None

    def stages(
        self, depths: Sequence[int], blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> list[State]:
        """The states before the blocks at `depths`, which ascend, and after all blocks."""
        states = []
        for start, stop in pairwise([0, *depths, len(blocks)]):
            state = self.chain(blocks[start:stop], state, conditions[start:stop], *shared)
            states.append(state)
        return states

    def repeated(
        self, choice: Hashable, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        assert isinstance(choice, PlannedChoice)
        stop = len(blocks) if choice.depth is None else choice.depth
        return self.chain(blocks[:stop], state, conditions[:stop], *shared)  # type: ignore[no-any-return]


def depths_after(schedule: Schedule) -> list[tuple[int, ...]]:
    """For each evaluation the depths at which later ones reuse it, ascending; none for one that is reused."""
    depths: list[set[int]] = [set() for _ in schedule]
    last = 0
    for step, depth in enumerate(schedule):
        if depth is None:
            last = step
        else:
            depths[last].add(depth)
    return [tuple(sorted(each)) for each in depths]
