"""The measurements of a search: rounds, in which candidates run one after the other, and ratios of their times."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

from sglang_gen.perf.log_ratio import Difference
from sglang_gen.tune.blocks import residual_variance
from sglang_gen.tune.candidate import BASE, Bounds, Candidate, CandidateVerdict, Observation

CONFIDENCE = 0.95
INDISTINCT = 0.02  # times that differ by less need not be told apart
LEAST_FREEDOM_OF_FINALS = 6  # degrees of freedom from which final rounds alone show the noise


@dataclass
class Round:
    """Candidates that generated the same images one after the other, so that a drift of the machine cancels."""

    images: int
    is_final: bool = False  # after the halving, whose choice favours candidates with lucky times
    seconds: dict[Candidate, float] = field(default_factory=dict)


@dataclass
class Trial:
    """All that is known of one candidate."""

    images: int = 0  # the most that it generated at once
    psnr: float = math.inf  # of the worst image so far
    psnrs: dict[int, float] = field(default_factory=dict)  # of the worst of the first images, by their number
    worst: object = None
    memory: float | None = None
    overhead: float = 0.0  # seconds of a measurement beside its generation: loading, warm-up, compilation
    seconds: float = 0.0  # elapsed per image, in the last measurement
    broken: CandidateVerdict | None = None  # the bound that it does not keep
    lost: tuple[CandidateVerdict, str] | None = None  # status and reason of a candidate that cannot be measured


class Trials:
    """The candidates that were tried and the rounds in which they were measured."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.rounds: list[Round] = []
        self.known: dict[Candidate, Trial] = {}
        self._known_noise = (0, 0.0, 0)  # number of measurements that it is from, variance, degrees of freedom

    def open(self, images: int, is_final: bool = False) -> None:
        """Begin a round."""
        self.rounds.append(Round(images, is_final))

    def add(self, candidate: Candidate, one: Observation) -> None:
        """Add a measurement to the last round."""
        trial, images = self.known.setdefault(candidate, Trial()), self.rounds[-1].images
        self.rounds[-1].seconds[candidate] = one.seconds
        elapsed = one.seconds if one.elapsed is None else one.elapsed
        trial.images, trial.seconds = max(trial.images, images), elapsed
        trial.psnrs[images] = one.psnr
        trial.overhead = max(one.wall - images * elapsed, 0.0)
        if one.psnr < trial.psnr or trial.worst is None:
            trial.psnr, trial.worst = min(one.psnr, trial.psnr), one.worst
        if one.memory is not None:
            trial.memory = max(one.memory, trial.memory or 0.0)
        trial.broken = trial.broken or self.bounds.broken_by(one)

    def lose(self, candidate: Candidate, status: CandidateVerdict, reason: str) -> None:
        """Note that a candidate cannot be measured."""
        self.known.setdefault(candidate, Trial()).lost = (status, reason)

    def is_measured(self, candidate: Candidate) -> bool:
        return candidate in self.known and self.known[candidate].images > 0

    def keeps(self, candidate: Candidate) -> bool:
        """Whether the candidate was measured and has kept the bounds so far.

        The images of a part of the manifest are among those of all of it, so a candidate that broke the bound once
        cannot keep it.
        """
        trial = self.known.get(candidate)
        return trial is not None and trial.images > 0 and trial.broken is None and trial.lost is None

    def breaks(self, candidate: Candidate) -> bool:
        """Whether the candidate was measured and has broken a bound."""
        return candidate in self.known and self.known[candidate].broken is not None

    def is_closer(self, candidate: Candidate, other: Candidate, margin: float) -> bool:
        """Whether the worst image of a candidate is closer to the reference by so many dB, on the same first images."""
        own, theirs = (self.known[each].psnrs for each in (candidate, other))
        both = own.keys() & theirs.keys()
        return bool(both) and own[max(both)] > theirs[max(both)] + margin

    def shared(self, one: Candidate, other: Candidate) -> list[Round]:
        """The rounds that compare two candidates: the final ones in which both took part, else those of most images."""
        both = [each for each in self.rounds if one in each.seconds and other in each.seconds]
        final = [each for each in both if each.is_final]
        most = max((each.images for each in both), default=0)
        return final or [each for each in both if each.images == most]

    def difference(self, one: Candidate, other: Candidate) -> Difference | None:
        """log(time of `other` / time of `one`), over the rounds that compare them; None if nothing does."""
        if one == other:
            return Difference(0.0, 0.0, 1.0)
        pairs = [each.seconds for each in self.shared(one, other)]
        if not pairs:
            return self._by_way_of_base(one, other)
        shift = fmean(math.log(each[other] / each[one]) for each in pairs)
        noise, freedom = self._noise()
        if not freedom:
            return Difference(shift, None, 0.0)
        return Difference(shift, math.sqrt(2 * noise / len(pairs)), float(freedom), 2 * noise)

    def _by_way_of_base(self, one: Candidate, other: Candidate) -> Difference | None:
        """The difference of two candidates that took part in no common round, from that of each to the base."""
        if BASE in (one, other):
            return None
        to_one, to_other = self.difference(BASE, one), self.difference(BASE, other)
        if to_one is None or to_other is None:
            return None
        shift = to_other.shift - to_one.shift
        if to_one.error is None or to_other.error is None:
            return Difference(shift, None, 0.0)
        variance = to_one.variance + to_other.variance
        return Difference(shift, math.hypot(to_one.error, to_other.error), to_one.freedom, variance)

    def _noise(self) -> tuple[float, int]:
        """Variance of the logarithm of a time, and its degrees of freedom, from all rounds: the final ones if these
        suffice.
        """
        count = sum(len(each.seconds) for each in self.rounds)
        if self._known_noise[0] != count:
            logs = [({name: math.log(value) for name, value in each.seconds.items()}, each.is_final)
                    for each in self.rounds]  # fmt: skip
            found = residual_variance([each for each, is_final in logs if is_final])
            if found[1] < LEAST_FREEDOM_OF_FINALS:
                found = residual_variance([each for each, _ in logs])
            self._known_noise = (count, *found)
        return self._known_noise[1:]

    def shift(self, candidate: Candidate) -> float | None:
        """log(time of the candidate / time of the base); None if they were not measured in one round."""
        found = self.difference(BASE, candidate)
        return None if found is None else found.shift

    def is_tied(self, one: Candidate, other: Candidate) -> bool:
        """Whether the rounds do not tell the times of two candidates apart."""
        found = self.difference(one, other)
        if found is None:
            return False
        interval = found.log_interval(CONFIDENCE)
        if interval is None:
            return abs(found.shift) <= INDISTINCT
        return interval[0] <= 0 <= interval[1]

    def are_equal(self, one: Candidate, other: Candidate) -> bool:
        """Whether two times differ by less than `INDISTINCT`, with confidence, so that no further round is needed."""
        found = self.difference(one, other)
        interval = None if found is None else found.log_interval(CONFIDENCE)
        return interval is not None and max(map(abs, interval)) < INDISTINCT

    def fastest(self, among: Iterable[Candidate]) -> list[Candidate]:
        """Candidates that keep the bounds and can be compared with the base, the fastest first."""
        able = [each for each in among if not each.is_baseline and self.keeps(each)]
        found = [(shift, len(each.changes), each) for each in able if (shift := self.shift(each)) is not None]
        return [each for *_, each in sorted(found, key=lambda item: item[:2])]

    def complete(self, images: int) -> list[Candidate]:
        """Candidates that generated all `images` and keep the bounds, the fastest first."""
        return self.fastest(each for each, trial in self.known.items() if trial.images >= images)

    def cost(self, candidate: Candidate, images: int, factor: float = 1.0) -> float:
        """Expected seconds of a measurement, from earlier ones of the candidate, of its changes alone or of the base.

        Zero before the base was measured. A candidate that was not measured is predicted to be slower by `factor`.
        """
        trial = self.known.get(candidate)
        if trial is not None and trial.images:
            return trial.overhead + images * trial.seconds
        known = [self.known[each] for each in (BASE, *candidate.singles) if self.is_measured(each)]
        if not known:
            return 0.0
        return factor * (max(each.overhead for each in known) + images * fmean([each.seconds for each in known]))
