"""A step cache with a fixed schedule, which says at which depth a step is reused, or that it is computed.

A reused step computes a part of the blocks, the larger the greater its depth, and takes what the others gave in the
last computed step. All images, branches and ranks do the same.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from sglang_gen.engine.caching.cached_chain import Conditions, Evaluation, PlannedChain
from sglang_gen.engine.caching.deep_cache import ends
from sglang_gen.models.chain import Block, State

Schedule = tuple[int | None, ...]  # for each evaluation the depth at which it is reused; None if it is computed


class PlannedCache(PlannedChain):
    """Follows a schedule. A subclass knows which blocks a depth computes."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.needed = schedule, depths_after(schedule)
        self.depths = tuple(sorted({depth for depth in schedule if depth is not None}))
        self.graphs = 1 + len(self.depths)
        self.depth: int | None = None  # of the evaluation that follows
        self.kept: dict[tuple[int, ...], dict[int, Tensor]] = {}  # of the last computed step, by branches and depth

    def begin(self, warming: bool = False) -> None:
        super().begin(warming)
        self.kept = {}

    def end(self) -> None:
        self.kept, self.added, self.computed = {}, None, ()

    @property
    def form(self) -> Hashable:
        return self.depth

    def before(self, evaluation: Evaluation) -> None:
        super().before(evaluation)
        self.depth = self._depth(evaluation)
        self.added = None if self.depth is None else (self.kept[evaluation.branches][self.depth],)
        choice = None if self.added is None else (self.depth, tuple(self.added[0].shape))
        self.decide(evaluation, "computed" if self.depth is None else "reused", choice)

    def _depth(self, evaluation: Evaluation) -> int | None:
        """The depth of an evaluation. A warm-up, whose steps are not those of the schedule, takes depths in turn."""
        if self.warming:
            turn = (None, *self.depths)
            depth = turn[evaluation.step % len(turn)]
        else:
            depth = self.schedule[evaluation.step]
        return depth if depth in self.kept.get(evaluation.branches, ()) else None

    def run(self, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any) -> State:
        """Only `depth`, `added` and `computed` differ between steps, so this can be compiled and captured."""
        if self.added is not None and self.depth is not None:
            return self.reused(self.depth, self.added[0], blocks, state, conditions, *shared)
        state, self.computed = self.full(self.depths, blocks, state, conditions, *shared)
        return state

    def after(self, evaluation: Evaluation) -> None:
        if self.depth is None:
            needed = self.depths if self.warming else self.needed[evaluation.step]
            found = zip(self.depths, self.computed, strict=True)
            self.kept[evaluation.branches] = {depth: tensor for depth, tensor in found if depth in needed}
        self.depth, self.added, self.computed = None, None, ()
        super().after(evaluation)

    def repeated(
        self, choice: Hashable, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        """`choice` is the depth of a reused evaluation and the shape of what it took; None if it was computed."""
        if choice is None:
            return self.chain(blocks, state, conditions, *shared)  # type: ignore[no-any-return]
        assert isinstance(choice, tuple)
        depth, shape = choice
        return self.reused(depth, state[0].new_empty(shape), blocks, state, conditions, *shared)

    def full(
        self, depths: Sequence[int], blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> tuple[State, tuple[Tensor, ...]]:
        """The state after all blocks, and for each depth what steps take that are reused there."""
        raise NotImplementedError

    def reused(
        self, depth: int, taken: Tensor, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        """The state of a step that is reused at a depth: `taken` stands for the blocks that it does not compute."""
        raise NotImplementedError

    def cost(self, depth: int, blocks: Sequence[Block]) -> int:
        """Number of blocks that a step computes which is reused at a depth."""
        raise NotImplementedError


class PlannedBlocks(PlannedCache):
    """Blocks of a transformer, whose state is the image `[B, L, D]` and the text `[B, T, D]`.

    At depth d the first d blocks are computed. The others have added a residual to the image.
    """

    def full(
        self, depths: Sequence[int], blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> tuple[State, tuple[Tensor, ...]]:
        before, state = self.stages(depths, blocks, state, conditions, *shared)
        return state, tuple(state[0] - stage for stage in before)

    def stages(
        self, depths: Sequence[int], blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> tuple[list[Tensor], State]:
        """The image before the block at each depth, and the state after all blocks."""
        before = []
        for start, stop in pairwise([0, *depths, len(blocks)]):
            state = self.chain(blocks[start:stop], state, conditions[start:stop], *shared)
            before.append(state[0])
        return before[:-1], state

    def reused(
        self, depth: int, taken: Tensor, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        state = self.chain(blocks[:depth], state, conditions[:depth], *shared)
        return (state[0] + taken, *state[1:])

    def cost(self, depth: int, blocks: Sequence[Block]) -> int:
        return depth


class PlannedBranches(PlannedCache):
    """Stages of a network with skip connections, whose state is a feature map `[B, C, h, w]` and its skip connections.

    A depth is a branch of DeepCache: the number of a skip connection, from the outermost. The stages between its ends
    have given a feature map.
    """

    def full(
        self, depths: Sequence[int], blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> tuple[State, tuple[Tensor, ...]]:
        places = [ends(blocks, depth)[1] for depth in reversed(depths)]  # a deeper branch joins earlier
        features = []
        for start, stop in pairwise([0, *places, len(blocks)]):
            state = self.chain(blocks[start:stop], state, conditions[start:stop], *shared)
            features.append(state[0])
        return state, tuple(reversed(features[:-1]))

    def reused(
        self, depth: int, taken: Tensor, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        down, up = ends(blocks, depth)
        _, skips = self.chain(blocks[:down], state, conditions[:down], *shared)
        return self.chain(blocks[up:], (taken, skips), conditions[up:], *shared)  # type: ignore[no-any-return]

    def cost(self, depth: int, blocks: Sequence[Block]) -> int:
        down, up = ends(blocks, depth)
        return down + len(blocks) - up


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
