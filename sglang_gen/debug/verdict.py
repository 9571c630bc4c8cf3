"""The result of a comparison: rows in the order of computation, and one verdict. Does not import torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """Ordered from best to worst."""

    exact = "bit-exact"
    equal = "numerically equal"
    different = "different"


@dataclass(frozen=True)
class Tolerance:
    """The largest max|a - b| / max|b| that counts as rounding, for one module and for a whole network."""

    module: float
    whole: float


# A module rounds to 2^-8 in bfloat16 and to 2^-11 in float16, once or twice and possibly in another order. Rounding
# grows through a whole network, and guidance at 7.5 multiplies the difference of two predictions by up to 14.
PARITY_TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5),
    "bfloat16": Tolerance(2e-2, 2e-1),
    "float16": Tolerance(2.5e-3, 2.5e-2),
}
LEVEL = 1 / 255  # one level of an 8-bit image: a difference that rounding can cause


@dataclass(frozen=True)
class Row:
    """One comparison. `step` is counted from 1; `error` is None if it could not be computed."""

    stage: str
    ours: str
    theirs: str
    error: float | None
    verdict: Verdict
    step: int | None = None
    note: str = ""
    outer: bool = True  # shown in the table, which leaves out modules inside other modules


@dataclass(frozen=True)
class Cause:
    """The innermost module that encloses a difference and whose input is the same on both sides."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class Report:
    """The whole comparison."""

    model: str
    dtype: str
    device: str
    tolerance: Tolerance
    rows: tuple[Row, ...]
    compared: int  # number of our modules with weights whose output was compared
    modules: int  # number of our modules with weights that ran
    left_out: tuple[str, ...]  # names of our modules with weights that were not compared
    cause: Cause | None = None  # set if the first difference is in a module whose input already differs

    @property
    def verdict(self) -> Verdict:
        return worst(row.verdict for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first row that differs."""
        return first_difference(self.rows)


def first_difference(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row.verdict is Verdict.different), None)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    order = list(Verdict)
    return max(verdicts, key=order.index, default=Verdict.exact)


def judge(error: float | None, tolerance: float) -> Verdict:
    """The verdict on a relative error; None, infinity and NaN do not count as rounding."""
    if error is None or not math.isfinite(error) or error > tolerance:
        return Verdict.different
    return Verdict.exact if error == 0 else Verdict.equal
