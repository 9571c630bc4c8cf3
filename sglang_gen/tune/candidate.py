"""A candidate of the search, what one measurement of it gives, and the bounds that it must keep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class CandidateVerdict(StrEnum):
    """The verdict on a candidate."""

    CHOSEN = "chosen"
    TIED = "tied"  # as fast as the fastest, within the interval
    KEPT = "kept"  # keeps the bounds over the whole manifest, and is slower
    SLOW = "too slow"  # dropped before it generated the whole manifest
    BELOW = "below the bound"
    OVER = "over memory"
    REFUSED = "refused"
    FAILED = "failed"
    UNFINISHED = "unfinished"  # the budget was spent before it generated the whole manifest
    UNMEASURED = "not measured"
    BASE = "base"
    BASELINE = "baseline"


@dataclass(frozen=True)
class Candidate:
    """The base configuration with at most one change per axis."""

    changes: tuple[tuple[str, str], ...] = ()  # (axis, its overrides), in the order of the axes
    is_baseline: bool = False  # measured for comparison only

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for _, words in self.changes for word in words.split(" "))

    @property
    def singles(self) -> "tuple[Candidate, ...]":
        """The candidates that make one of these changes alone."""
        return tuple(Candidate((change,)) for change in self.changes)

    def __str__(self) -> str:
        words = " ".join(self.words)
        return f"baseline {words}" if self.is_baseline else words or "base"


BASE = Candidate()


@dataclass(frozen=True)
class Observation:
    """One measurement: the generation of the first images of the manifest."""

    seconds: float  # per image, without loading, warm-up and saving; elapsed or processor time
    psnr: float  # of the worst image, in dB; infinite if all are identical to the reference
    memory: float | None = None  # peak in bytes
    wall: float = 0.0  # seconds that the measurement took, with loading, warm-up and compilation
    elapsed: float | None = None  # elapsed seconds per image, if `seconds` is processor time
    worst: Mapping[str, object] | None = None  # index and prompt of the worst image


@dataclass(frozen=True)
class Bounds:
    """What every image and the memory of a candidate must keep."""

    psnr: float  # dB
    memory: float = math.inf  # bytes

    def broken_by(self, one: Observation) -> CandidateVerdict | None:
        """`below the bound` or `over memory`; None if the observation keeps both."""
        if one.psnr < self.psnr:
            return CandidateVerdict.BELOW
        return CandidateVerdict.OVER if one.memory is not None and one.memory > self.memory else None


def slowness_sentence(ratio: float) -> str:
    """Why a candidate is not worth a measurement beside a base that keeps the bounds."""
    return f"a step is predicted to take {ratio:.2f} times as long as that of the base"


class CandidateError(Exception):
    """A candidate cannot be measured: its status, refused or failed, and the reason."""

    def __init__(self, status: CandidateVerdict, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Bench(Protocol):
    """What the search asks of the machine."""

    images: int  # of the whole manifest
    jobs: dict[Candidate, int]  # number of the folder of each measured candidate

    def refusal(self, candidate: Candidate) -> str | None:
        """Why the candidate need not or cannot be measured, known without measuring it."""
        ...

    def slowness(self, candidate: Candidate) -> float | None:
        """How many times as long as the base the candidate is predicted to take, if it is clearly slower."""
        ...

    def measure(self, candidate: Candidate, images: int) -> Observation:
        """Generate the first `images` images of the manifest. Raises CandidateError."""
        ...

    def tell(self, line: str) -> None:
        """Show a line about the progress."""
        ...

    def elapsed(self) -> float:
        """Seconds since the start of the command."""
        ...
