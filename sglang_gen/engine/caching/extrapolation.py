"""TaylorSeer (Liu et al. 2025): what a step would compute, extrapolated from the steps that were computed."""

import math

from torch import Tensor

DIFFERENCES_FROM = 3  # step from which on differences are taken, as in cache-dit


class History:
    """A tensor over the steps of a generation: its last computed value and finite differences up to `order`.

    With order 0 the last value is repeated.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.terms: list[Tensor] = []  # value, first difference, second difference, ...
        self.last = 0  # step of the value
        self.first: int | None = None

    def add(self, step: int, value: Tensor) -> None:
        """Record what `step` computed."""
        if self.first is None:
            self.first = step
        terms, window = [value], step - self.last
        if step - self.first >= DIFFERENCES_FROM:
            for previous in self.terms[: self.order]:
                terms.append((terms[-1] - previous) / window)
        self.terms, self.last = terms, step

    def at(self, step: int) -> Tensor:
        """The value that is expected at `step`."""
        elapsed = step - self.last
        value = self.terms[0]
        for order, term in enumerate(self.terms[1:], start=1):
            value = value + (1 / math.factorial(order)) * term * elapsed**order
        return value
