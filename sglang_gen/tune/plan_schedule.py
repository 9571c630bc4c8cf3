"""The schedule of a planned step cache with the least expected error for a number of computed blocks.

Dynamic programming over the steps. The state is the last computed step and the number of blocks computed so far: after
it, a step is either computed, at the cost of all blocks, or reused at one of the depths, at the cost of a part of
them and an error that calibration has measured. Errors of different steps are added.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Table = np.ndarray[Any, Any]
Errors = Mapping[tuple[int, int, int], float]  # (source step, step, depth) -> expected error


@dataclass(frozen=True)
class PlannedSchedule:
    """`depths` has None for a step that is computed; `blocks` are computed in total, and `error` is expected."""

    depths: tuple[int | None, ...]
    blocks: int
    error: float


@dataclass(frozen=True)
class Planner:
    """Schedules of `steps` steps for a network of `blocks` blocks. The first step is always computed.

    A step can be reused from the source steps and at the depths that `errors` has; `costs` is the number of blocks that
    it then computes, by depth.
    """

    errors: Errors
    steps: int
    blocks: int
    costs: Mapping[int, int]

    @property
    def most(self) -> int:
        """Blocks that are computed if nothing is reused."""
        return self.steps * self.blocks

    @cached_property
    def least(self) -> int:
        """The smallest number of computed blocks that a schedule has."""
        return int(np.flatnonzero(np.isfinite(self._least_errors))[0])

    def schedule(self, budget: int) -> PlannedSchedule:
        """The schedule with the least error of those that compute at most `budget` blocks, and the fewest blocks of
        those with equal errors. Raises ValueError for a budget below `least`."""
        if budget < self.least:
            raise ValueError(f"the smallest schedule computes {self.least} blocks")
        blocks = int(np.argmin(self._least_errors[: budget + 1]))  # the first of equal ones
        source = int(np.argmin(self._tables[0][:, blocks]))
        return PlannedSchedule(self._walk(source, blocks), blocks, float(self._least_errors[blocks]))

    @cached_property
    def _least_errors(self) -> Table:
        """By the number of computed blocks, the least error of all schedules with exactly that many."""
        return np.min(self._tables[0], axis=0)  # type: ignore[no-any-return]

    @cached_property
    def _tables(self) -> tuple[Table, list[Table]]:
        """Arrays `[last computed step, blocks computed so far]`: the least errors after the last step, and the
        decision of every step that leads there: the previous last computed step if it is computed, else its depth."""
        size, all_decisions = self.most + 1, []
        errors = np.full((self.steps, size), math.inf)
        errors[0, self.blocks] = 0.0
        for step in range(1, self.steps):
            before, errors = errors, np.full((self.steps, size), math.inf)
            decisions = np.zeros((self.steps, size), dtype=np.int32)
            errors[step, self.blocks :] = before[:step, : size - self.blocks].min(axis=0)
            decisions[step, self.blocks :] = before[:step, : size - self.blocks].argmin(axis=0)
            for (source, _, depth), error in self._by_step[step]:
                cost = self.costs[depth]
                reused = before[source, : size - cost] + error
                better = reused < errors[source, cost:]
                errors[source, cost:][better] = reused[better]
                decisions[source, cost:][better] = depth
            all_decisions.append(decisions)
        return errors, all_decisions

    @cached_property
    def _by_step(self) -> list[list[tuple[tuple[int, int, int], float]]]:
        """The errors of each step, smaller depths first."""
        found: list[list[tuple[tuple[int, int, int], float]]] = [[] for _ in range(self.steps)]
        for entry in sorted(self.errors.items()):
            found[entry[0][1]].append(entry)
        return found

    def _walk(self, last: int, blocks: int) -> tuple[int | None, ...]:
        """The decisions of all steps that end in a state."""
        depths: list[int | None] = []
        for step in range(self.steps - 1, 0, -1):
            decision = int(self._tables[1][step - 1][last, blocks])
            if step == last:
                depths.append(None)
                last, blocks = decision, blocks - self.blocks
            else:
                depths.append(decision)
                blocks -= self.costs[decision]
        return (None, *reversed(depths))


def expected_error(errors: Errors, depths: tuple[int | None, ...]) -> float:
    """The sum of the errors of a schedule; infinite if it reuses what was not calibrated."""
    total, source = 0.0, 0
    for step, depth in enumerate(depths):
        if depth is None:
            source = step
        else:
            total += errors.get((source, step, depth), math.inf)
    return total
