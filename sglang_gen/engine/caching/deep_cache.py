"""DeepCache (Ma et al. 2023): steps that reuse a UNet's deep feature map and compute its shallow stages only.

A skip connection leads from the way down to the way up. The branch of the cache names one, counted from the outermost.
A reused step computes the stages down to it, takes the feature map that the last full step brought to its other end,
and computes the stages from there. Which steps are full is known before the generation starts.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from sglang_gen.engine.caching.cached_chain import Conditions, Evaluation, PlannedChain
from sglang_gen.models.chain import Block, State


class DeepCache(PlannedChain):
    """Runs the stages of a UNet, whose state is a feature map `[B, C, h, w]` and its skip connections.

    A step in which guidance starts or stops is a full one, because its batch is another.
    """

    def __init__(self, branch: int, schedule: Callable[[int], Sequence[int]]) -> None:
        """`branch` is the skip connection, 0 for that of the first convolution.

        `schedule(evaluations)` has a 1 for each evaluation of a generation that is a full one, and a 0 for the others.
        """
        super().__init__()
        self.branch, self.schedule = branch, lru_cache(schedule)
        self._clear()

    def _clear(self) -> None:
        self.added, self.computed = None, ()
        self.kept: dict[tuple[int, ...], tuple[Tensor, ...]] = {}  # of full steps, by the branches of the call
        self.reuses = False
        self.guided: bool | None = None  # whether the last evaluation was guided
        self.decided: int | None = None  # index of the last evaluation

    def end(self) -> None:
        self._clear()

    def before(self, evaluation: Evaluation) -> None:
        super().before(evaluation)
        if evaluation.index != self.decided:  # guidance branches do alike, also if one is computed after the other
            self.reuses = self.guided == evaluation.guided and not self._is_full(evaluation)
            self.guided, self.decided = evaluation.guided, evaluation.index
        self.added = self.kept[evaluation.branches] if self.reuses else None
        self.decide(
            evaluation, "reused" if self.reuses else "computed", tuple(self.added[0].shape) if self.added else None
        )

    def _is_full(self, evaluation: Evaluation) -> bool:
        """Whether the schedule computes the evaluation. A warm-up compiles, so all but its first reuse."""
        return evaluation.step == 0 if self.warming else bool(self.schedule(evaluation.evaluations)[evaluation.step])

    def after(self, evaluation: Evaluation) -> None:
        if not self.reuses:
            self.kept[evaluation.branches] = self.computed
        self.added, self.computed = None, ()
        super().after(evaluation)

    def run(self, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any) -> State:
        """Only `added` and `computed` differ between steps, so this can be compiled and captured."""
        if self.added is not None:
            return self._shallow(self.added[0], blocks, state, conditions, *shared)
        _, up = ends(blocks, self.branch)
        state = self.chain(blocks[:up], state, conditions[:up], *shared)
        self.computed = (state[0],)
        return self.chain(blocks[up:], state, conditions[up:], *shared)  # type: ignore[no-any-return]

    def _shallow(
        self, deep: Tensor, blocks: Sequence[Any], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        """The state after the shallow stages, with the feature map `deep` in place of the deep ones."""
        down, up = ends(blocks, self.branch)
        _, skips = self.chain(blocks[:down], state, conditions[:down], *shared)
        assert len(skips) == sum(stage.pops for stage in blocks[up:]), "skip connections are left over or missing"
        return self.chain(blocks[up:], (deep, skips), conditions[up:], *shared)  # type: ignore[no-any-return]

    def repeated(
        self, choice: Hashable, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        """`choice` is the shape of the feature map that the evaluation reused; None if it was a full one."""
        if choice is None:
            return self.chain(blocks, state, conditions, *shared)  # type: ignore[no-any-return]
        assert isinstance(choice, tuple)
        return self._shallow(state[0].new_empty(choice), blocks, state, conditions, *shared)


def ends(stages: Sequence[Any], branch: int) -> tuple[int, int]:
    """Where the skip connection leads from and to: the number of stages before its push, and the stage that pops it."""
    pushed = [0, *(place + 1 for place, stage in enumerate(stages) if stage.pushes)]
    popped = [place for place, stage in enumerate(stages) if stage.pops]
    return pushed[branch], popped[-1 - branch]
