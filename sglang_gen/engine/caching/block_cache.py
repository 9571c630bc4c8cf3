"""DBCache (cache-dit): steps that reuse the middle blocks of a transformer while the first blocks change little.

Every step computes the first blocks. The change of their residual since the last computed step, on the image stream,
decides whether the middle blocks are computed or their residual is added as it was, or as TaylorSeer extrapolates it.
Each image decides for itself, with both of its guidance branches where these are evaluated together.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.caching.cached_chain import BRANCHES, CachedChain, Conditions, Decision, Evaluation
from sglang_gen.engine.caching.decider import Decider, Rules
from sglang_gen.engine.caching.extrapolation import History
from sglang_gen.errors import RunError
from sglang_gen.models.chain import Block, State
from sglang_gen.parallel.collectives import Axis, all_reduce, gather


@dataclass(frozen=True)
class BlockChoice:
    """What an evaluation did: which rows were reused, and of how many units the ranks compared the residuals."""

    reused: tuple[bool, ...]
    units: int = 0
    compared: int = 0
    over_guidance: bool = False


@dataclass
class Unit:
    """What decides on its own: an image with its branches, or one branch of an image. Tensors have a row per branch."""

    image: int
    decider: Decider
    rows: list[int] = field(default_factory=list)  # of the evaluation that runs, on this rank
    branches: tuple[int, ...] = ()  # of the evaluation that runs, on all ranks
    computed: tuple[int, ...] = ()  # branches of the last computed step
    residual: Tensor | None = None  # of the first blocks in the last computed step [branches, L, D]
    middle: list[History] = field(default_factory=list)  # residuals of the middle blocks, one for each stream


@dataclass(frozen=True)
class Ranks:
    """The axes over which an evaluation is spread.

    Sums run over the shards of the tokens, and over the guidance branches where an image decides with both. The ranks
    of a tensor parallel group have the same tokens, so the first of them speaks for all.
    """

    sequence: Axis
    guidance: Axis
    tensor: Axis


class BlockCache(CachedChain):
    """Runs the blocks of a transformer, whose state is the image `[B, L, D]` and the text `[B, T, D]`."""

    def __init__(
        self,
        rules: Rules,
        first: int,
        last: int = 0,
        order: int = 0,
        separate: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """The `first` and `last` blocks are always computed.

        `order` is that of TaylorSeer, 0 to repeat residuals. `separate` lets each guidance branch decide for itself;
        None does so where the branches are evaluated one after the other. `ranks` is None in one process.
        """
        super().__init__()
        self.rules, self.first, self.last, self.order, self.separate = rules, first, last, order, separate
        self.ranks = ranks
        self.units: dict[tuple[int, int | None], Unit] = {}  # by image and, where it decides alone, branch

    def begin(self, warming: bool = False) -> None:
        super().begin(warming)
        self.units = {}

    def end(self) -> None:
        self.units = {}

    def evaluated(
        self, evaluation: Evaluation, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        before, middle = state[0], slice(self.first, len(blocks) - self.last)
        state = self.chain(blocks[: self.first], state, conditions[: self.first], *shared)
        residual = state[0] - before
        units = self._units_of(evaluation)
        reused = self._decide(evaluation, units, residual)
        state = self._middle(evaluation, units, reused, residual, blocks[middle], state, conditions[middle], *shared)
        return self.chain(blocks[middle.stop :], state, conditions[middle.stop :], *shared)  # type: ignore[no-any-return]

    def _units_of(self, evaluation: Evaluation) -> list[Unit]:
        """The units of an evaluation, with their branches and rows in it."""
        images, branches = evaluation.images, evaluation.branches
        places: list[tuple[int | None, list[int]]] = [(None, list(range(len(branches))))]
        if self._alone(evaluation):
            places = [(branch, [place]) for place, branch in enumerate(branches)]
        units = []
        for branch, found in places:
            for image in range(images):
                unit = self.units.setdefault((image, branch), Unit(image, Decider(self.rules)))
                unit.rows = [image + place * images for place in found]
                unit.branches = evaluation.together if branch is None else (branch,)
                units.append(unit)
        return units

    def _alone(self, evaluation: Evaluation) -> bool:
        """Whether each branch of an image decides for itself."""
        return evaluation.sequential if self.separate is None else self.separate

    def _decide(self, evaluation: Evaluation, units: Sequence[Unit], residual: Tensor) -> list[bool]:
        """Whether each unit is reused. Collective where residuals are compared."""
        step, over_guidance = evaluation.step, not self._alone(evaluation) and self._is_split(evaluation)
        reused: dict[int, bool] = {}
        compared: dict[int, float] = {}
        for number, unit in enumerate(units):
            unit.decider.begin(step)
            known = unit.decider.without_residual(step) if unit.computed == unit.branches else False
            if known is None:
                compared[number] = math.nan
            else:
                reused[number] = known
        if compared:
            pending = [units[number] for number in compared]
            for number, change in zip(compared, self._changes(pending, residual, over_guidance), strict=True):
                compared[number], reused[number] = change, units[number].decider.with_residual(change)
        decided = [reused[number] for number in range(len(units))]
        if compared:
            self._require_agreement(step, decided, residual.device, over_guidance)
        for number, unit in enumerate(units):
            if decided[number]:
                unit.decider.reuse(step)
            self._note(step, unit, decided[number], compared.get(number))
        rows = {row: decided[number] for number, unit in enumerate(units) for row in unit.rows}
        self.choice = BlockChoice(tuple(rows[row] for row in sorted(rows)), len(units), len(compared), over_guidance)
        return decided

    def _is_split(self, evaluation: Evaluation) -> bool:
        """Whether other ranks compute the other guidance branch of this evaluation."""
        return evaluation.together != evaluation.branches

    def _note(self, step: int, unit: Unit, reused: bool, change: float | None) -> None:
        how = "computed" if not reused else "extrapolated" if self.order else "reused"
        threshold = None if change is None else self.rules.threshold
        self.decisions += [Decision(step, unit.image, BRANCHES[each], how, change, threshold) for each in unit.branches]

    def _changes(self, units: Sequence[Unit], residual: Tensor, over_guidance: bool) -> list[float]:
        """The relative change of each unit's residual since its last computed step. Collective."""
        wide = torch.promote_types(residual.dtype, torch.float32)
        sums = []
        for unit in units:
            assert unit.residual is not None
            now = _rows(residual, unit.rows)
            sums += [(unit.residual - now).abs().sum(dtype=wide), unit.residual.abs().sum(dtype=wide)]
        total = self._reduced(torch.stack(sums), over_guidance)
        pairs = zip(*[iter(total.tolist())] * 2, strict=True)
        return [difference / size if size else math.inf for difference, size in pairs]

    def _reduced(self, sums: Tensor, over_guidance: bool) -> Tensor:
        """Sums over all tokens and branches, the same on each rank. Shards are unequal, so means are never averaged."""
        if self.ranks is None:
            return sums
        if self.ranks.sequence.size > 1:
            sums = all_reduce(sums, self.ranks.sequence)
        if over_guidance:
            sums = all_reduce(sums, self.ranks.guidance)
        return gather(sums, self.ranks.tensor).wait()[0] if self.ranks.tensor.size > 1 else sums

    def _require_agreement(self, step: int, decided: Sequence[bool], device: Any, over_guidance: bool) -> None:
        """Raises RunError on all ranks if some that compute the same images disagree: they would wait for each other.

        What one axis finds travels along the next.
        """
        mine = torch.tensor([*decided, False], dtype=torch.float32, device=device)
        for axis in self._agreeing(over_guidance):
            total = all_reduce(mine, axis)
            differs = (total[:-1] != axis.size * mine[:-1]).any() | (total[-1] > 0)
            mine = torch.cat([mine[:-1], differs.to(mine.dtype)[None]])
        if not mine.is_meta and bool(mine[-1]):
            raise RunError(f"cache: the ranks disagree on whether step {step} is reused")

    def _agreeing(self, over_guidance: bool) -> list[Axis]:
        """The axes whose ranks must decide alike."""
        if self.ranks is None:
            return []
        axes = [self.ranks.sequence, self.ranks.tensor, *([self.ranks.guidance] if over_guidance else [])]
        return [axis for axis in axes if axis.size > 1]

    def _middle(
        self,
        evaluation: Evaluation,
        units: Sequence[Unit],
        reused: Sequence[bool],
        residual: Tensor,
        blocks: Sequence[Block],
        start: State,
        conditions: Conditions,
        *shared: Any,
    ) -> State:
        """The state after the middle blocks, which run for the rows that are not reused."""
        streams = len(start) if self.last else 1  # without last blocks the text is not read again
        rows = sorted(row for unit, reuses in zip(units, reused, strict=True) if not reuses for row in unit.rows)
        parts: list[list[tuple[list[int], Tensor]]] = [[] for _ in range(streams)]
        if rows:
            computed = self._run(blocks, start, conditions, rows, shared)
            parts = [[(rows, tensor)] for tensor in computed[:streams]]
        for unit, reuses in zip(units, reused, strict=True):
            if reuses:
                for stream, history in enumerate(unit.middle):
                    value = history.at(evaluation.step) + _rows(start[stream], unit.rows)
                    parts[stream].append((unit.rows, value))
                continue
            if unit.computed != unit.branches:
                unit.middle = [History(self.order) for _ in range(streams)]
            unit.computed, unit.residual = unit.branches, _rows(residual, unit.rows)
            places = [rows.index(row) for row in unit.rows]
            for stream, history in enumerate(unit.middle):
                after = _rows(computed[stream], places)
                history.add(evaluation.step, after - _rows(start[stream], unit.rows))
        whole = tuple(_assembled(part, start[stream]) for stream, part in enumerate(parts))
        return (*whole, *start[len(whole) :])

    def _run(
        self, blocks: Sequence[Block], start: State, conditions: Conditions, rows: list[int], shared: tuple[Any, ...]
    ) -> State:
        """The state of these rows after the blocks. Conditions have a row per sample, and so have shared tensors;
        shared tables, such as rotary ones, come in tuples.
        """
        count = len(start[0])
        if len(rows) < count:
            start = tuple(_rows(stream, rows) for stream in start)
            conditions = [tuple(_rows(each, rows) for each in condition) for condition in conditions]
            shared = tuple(_rows(each, rows) if isinstance(each, Tensor) else each for each in shared)
        return self.chain(blocks, start, conditions, *shared)  # type: ignore[no-any-return]

    def repeated(
        self, choice: Hashable, blocks: Sequence[Block], state: State, conditions: Conditions, *shared: Any
    ) -> State:
        assert isinstance(choice, BlockChoice)
        middle = slice(self.first, len(blocks) - self.last)
        state = self.chain(blocks[: self.first], state, conditions[: self.first], *shared)
        if choice.compared:
            wide = torch.promote_types(state[0].dtype, torch.float32)
            self._reduced(torch.empty(2 * choice.compared, dtype=wide, device=state[0].device), choice.over_guidance)
            self._require_agreement(0, [False] * choice.units, state[0].device, choice.over_guidance)
        rows = [row for row, reuses in enumerate(choice.reused) if not reuses]
        if rows:
            self._run(blocks[middle], state, conditions[middle], rows, shared)
        return self.chain(blocks[middle.stop :], state, conditions[middle.stop :], *shared)  # type: ignore[no-any-return]

    def partial_choices(self, images: int, branches: int) -> list[Hashable]:
        if not self.rules.dynamic:
            return []
        size = 1 if self.separate else branches
        rows = images * branches
        return [BlockChoice((True,) * (rows - some) + (False,) * some) for some in range(size, rows, size)]


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """These rows of `[B, ...]`; the tensor itself if they are all of its rows."""
    return tensor if rows == list(range(len(tensor))) else tensor[rows]


def _assembled(parts: list[tuple[list[int], Tensor]], like: Tensor) -> Tensor:
    """One tensor from parts, each with the rows that it has."""
    if len(parts) == 1 and parts[0][0] == list(range(len(like))):
        return parts[0][1]
    assert sum(len(rows) for rows, _ in parts) == len(like), "a row is computed or reused, and each row once"
    whole = torch.empty_like(like)
    for rows, part in parts:
        whole[rows] = part
    return whole
