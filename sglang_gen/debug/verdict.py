"""What a comparison says: rows in the order of computation, and one verdict on all of them. Imports no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """From the best to the worst."""

    exact = "bit-exact"
    equal = "numerically equal"
    different = "different"


@dataclass(frozen=True)
class Tolerance:
    """The largest max|a - b| / max|b| that is rounding: of one module, and of what has passed a whole network."""

    module: float
    whole: float


# A module rounds bfloat16 to 2^-8 and float16 to 2^-11, once or twice, in another order here and there. Through a whole
# network that grows, and guidance at 7.5 multiplies what two predictions differ by up to 14 times.
PARITY_TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-5),
    "bfloat16": Tolerance(2e-2, 2e-1),
    "float16": Tolerance(2.5e-3, 2.5e-2),
}
LEVEL = 1 / 255  # of a picture: where rounding to 8 bits falls on the other side


@dataclass(frozen=True)
class Row:
    """One comparison. `step` counts evaluations of the network from 1; `error` is None where there is no number."""

    stage: str
    ours: str
    theirs: str
    error: float | None
    verdict: Verdict
    step: int | None = None
    note: str = ""
    outer: bool = True  # shown in the table, which leaves out modules inside of others


@dataclass(frozen=True)
class Cause:
    """The innermost module around a difference whose own input is the same on both sides."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class Report:
    model: str
    dtype: str
    device: str
    tolerance: Tolerance
    rows: tuple[Row, ...]
    compared: int  # modules of ours with weights whose output stands beside theirs
    modules: int  # modules of ours with weights that ran
    left_out: tuple[str, ...]  # the others, by our name
    cause: Cause | None = None  # only where the first difference is a module whose input differs already

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
    """The verdict on a relative error; None, infinity and NaN are no rounding."""
    if error is None or not math.isfinite(error) or error > tolerance:
        return Verdict.different
    return Verdict.exact if error == 0 else Verdict.equal
