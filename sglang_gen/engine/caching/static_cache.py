"""Block caches with a fixed plan: which steps are reused depends on the step alone."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_gen.engine.caching.cached_chain import Conditions, Evaluation, PlannedChain
from sglang_gen.engine.caching.decider import Decider, Rules
from sglang_gen.engine.caching.extrapolation import History
from sglang_gen.models.chain import Block, State


@dataclass
class Slot:
    """The residuals of evaluations that follow one another: of all branches, or of one that is computed on its own."""

    decider: Decider
    together: tuple[int, ...] = ()  # branches of the last computed step
    middle: list[History] = field(default_factory=list)


class StaticCache(PlannedChain):
    """Runs the blocks of a transformer, whose state is the image `[B, L, D]` and the text `[B, T, D]`.

    It is given what the middle blocks add to each stream.
    """

    def __init__(self, rules: Rules, first: int, last: int = 0, order: int = 0) -> None:
        """The `first` and last blocks are always computed; `order` is that of TaylorSeer, 0 to repeat residuals."""
        super().__init__()
        assert not rules.dynamic
        self.rules, self.first, self.last, self.order = rules, first, last, order
        self.slots: dict[tuple[int, ...], Slot] = {}

    def begin(self, warming: bool = False) -> None:
        super().begin(warming)
        self.slots = {}

    def end(self) -> None:
        self.slots, self.added, self.computed = {}, None, ()

    def before(self, evaluation: Evaluation) -> None:
        slot, step = self._slot(evaluation), evaluation.step
        slot.decider.begin(step)
        reused = slot.together == evaluation.together and bool(slot.decider.without_residual(step))
        self.added = None
        if reused:
            slot.decider.reuse(step)
            self.added = tuple(history.at(step) for history in slot.middle)
        self.decide(evaluation, "computed" if not reused else "extrapolated" if self.order else "reused", reused)

    def _slot(self, evaluation: Evaluation) -> Slot:
        rules = WARMING if self.warming else self.rules
        return self.slots.setdefault(evaluation.branches if evaluation.sequential else (), Slot(Decider(rules)))

    def run(self, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any) -> State:
        middle = slice(self.first, len(blocks) - self.last)
        state = self.chain(blocks[: self.first], state, conditions[: self.first], *shared)
        if self.added is None:
            start = state
            state = self.chain(blocks[middle], state, conditions[middle], *shared)
            streams = len(state) if self.last else 1  # without last blocks the text is not read again
            self.computed = tuple(after - before for after, before in zip(state[:streams], start, strict=False))
        else:
            added = tuple(before + residual for before, residual in zip(state, self.added, strict=False))
            state = (*added, *state[len(added) :])
        return self.chain(blocks[middle.stop :], state, conditions[middle.stop :], *shared)  # type: ignore[no-any-return]

    def after(self, evaluation: Evaluation) -> None:
        slot = self._slot(evaluation)
        if self.added is None:
            if slot.together != evaluation.together:
                slot.together, slot.middle = evaluation.together, [History(self.order) for _ in self.computed]
            for history, residual in zip(slot.middle, self.computed, strict=True):
                history.add(evaluation.step, residual)
        self.added, self.computed = None, ()
        super().after(evaluation)

    def repeated(
        self, choice: Hashable, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        middle = slice(self.first, len(blocks) - self.last) if choice else slice(len(blocks), len(blocks))
        rest = [*range(middle.start), *range(middle.stop, len(blocks))]
        return self.chain([blocks[each] for each in rest], state, [conditions[each] for each in rest], *shared)  # type: ignore[no-any-return]


WARMING = Rules(1.0, mask=(1, 0), static=True)  # the second step of a warm-up is reused, so that it is compiled too
