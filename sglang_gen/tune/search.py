"""The search: each change alone, then products of those that helped, then the neighbours of the best.

1. Every change of every axis is measured alone beside the base, on the first images of the manifest.
2. Products of the changes that helped take part in successive halving, most promising first.
3. The fastest generate the whole manifest until enough of them keep the bound. Then they are timed in rounds of fewer
   images: many short rounds tell times apart better than few long ones.
4. Candidates that differ from the best in one axis are measured beside it, until none is better.
5. What is left of the budget goes to rounds that tell the best ones apart.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sglang_gen import log
from sglang_gen.tune.candidate import (
    BASE,
    Bench,
    Bounds,
    Candidate,
    CandidateError,
    CandidateVerdict,
    Observation,
    slowness_sentence,
)
from sglang_gen.tune.halving import entrants, halve, image_counts
from sglang_gen.tune.surrogate import GAIN, Surrogate
from sglang_gen.tune.trials import Trials

FIRST_IMAGES = 2  # images of the first rung
BESIDE_BASE = 4  # candidates that are measured in one round with the base
FINALISTS = 3  # candidates that are told apart on the whole manifest
LEAST_OBSERVATIONS, MOST_OBSERVATIONS = 5, 25  # final rounds of each finalist
MOST_ENTRANTS = 48  # of the halving
QUALITY_SLACK = 0.5  # dB by which a prediction may be below the bound; errors of two changes rarely cancel
SIMPLER = 0.03  # fraction of the time by which a simpler neighbour may be slower and still generates the whole manifest
ENDS = {"screening": 0.4, "halving": 0.65}  # when a phase ends, as a fraction of the time that the search has


class Search:
    """Spends a budget of seconds on candidates; `trials` has what was found so far, also after an interrupt."""

    def __init__(
        self,
        axes: Mapping[str, Sequence[str]],
        bench: Bench,
        bounds: Bounds,
        budget: float,
        seed: int = 0,
        baseline: Candidate | None = None,
    ) -> None:
        self.axes, self.bench, self.budget, self.baseline = axes, bench, budget, baseline
        self.trials = Trials(bounds)
        self.surrogate = Surrogate(self.trials)
        self.counts = image_counts(bench.images, FIRST_IMAGES)
        self.timed = self.counts[min(1, len(self.counts) - 1)]  # images of a round that tells times apart
        self.random = random.Random(seed)
        self.began = 0.0  # seconds since the start of the command, which include the reference
        self.is_cut = False  # whether the budget ended before the search did
        self.is_interrupted = False  # whether a signal ended the search
        self.slower: set[Candidate] = set()  # refused because they are predicted to be slower
        self.promising: list[Candidate] = []  # combinations, the most promising first

    def run(self) -> None:
        """Search until nothing better is expected or the budget is spent. Raises CandidateError if the base fails."""
        self.began = self.bench.elapsed()
        self._measure_base()
        self._screen(self._ends("screening"))
        self._halve()
        self._finish()
        self._refine()
        self._resolve()

    @property
    def unmeasured(self) -> int:
        """The number of promising combinations that were not measured."""
        return sum(each not in self.trials.known for each in self.promising)

    @property
    def leader(self) -> Candidate | None:
        """The fastest candidate that keeps the bounds over the whole manifest."""
        found = self.trials.complete(self.bench.images)
        return found[0] if found else None

    @property
    def tied(self) -> list[Candidate]:
        """The candidates that the rounds do not tell apart from the leader, with itself, the fastest first."""
        found = self.trials.complete(self.bench.images)
        return [each for each in found if each == found[0] or self.trials.is_tied(found[0], each)]

    @property
    def chosen(self) -> Candidate | None:
        """Of the leader and those tied with it the one with the fewest changes, and of these the fastest."""
        return min(self.tied, key=lambda each: len(each.changes), default=None)

    def allowed(self, candidate: Candidate) -> bool:
        """Whether a candidate can be measured; notes why not."""
        known = self.trials.known.get(candidate)
        if known is not None and candidate not in self.slower:
            return known.lost is None
        reason = self.bench.refusal(candidate)
        self.slower.discard(candidate)
        if reason is None and not self.trials.breaks(BASE) and (ratio := self.bench.slowness(candidate)) is not None:
            self.slower.add(candidate)
            reason = slowness_sentence(ratio)
        if reason is not None:
            self.trials.lose(candidate, CandidateVerdict.REFUSED, reason)
        elif known is not None:  # it was refused before the base broke a bound
            del self.trials.known[candidate]
        return reason is None

    def _ends(self, phase: str) -> float:
        return self.began + ENDS[phase] * (self.budget - self.began)

    def _measure_base(self) -> None:
        self.trials.open(self.counts[0])
        self._note(BASE, self.bench.measure(BASE, self.counts[0]))
        if self.baseline is not None:  # here too, in case the budget ends before the finalists are measured
            self._measure(self.baseline, self.counts[0])

    def _measure(self, candidate: Candidate, images: int) -> None:
        try:
            one = self.bench.measure(candidate, images)
        except CandidateError as error:
            self.trials.lose(candidate, error.status, error.reason)
            self.bench.tell(f"{candidate}: {error.status}: {error.reason}")
            return
        self._note(candidate, one)

    def _note(self, candidate: Candidate, one: Observation) -> None:
        self.trials.add(candidate, one)
        images, base = self.trials.rounds[-1].images, self.trials.rounds[-1].seconds.get(BASE)
        ratio = "" if base is None or candidate == BASE else f", {base / one.seconds:.2f}x"
        quality = "identical" if math.isinf(one.psnr) else f"worst {one.psnr:.2f} dB"
        self.bench.tell(
            f"{self.bench.elapsed() / 60:.1f} of {self.budget / 60:.3g} min: {candidate}: "
            f"{log.quantity(images, 'image')}, {one.seconds:.3g} s each{ratio}, {quality}"
        )

    def _fits(self, entries: Iterable[Candidate], images: int, end: float) -> bool:
        """Whether the measurements are expected to end before `end`; otherwise the search was cut."""
        cost = sum(self.trials.cost(each, images, self.bench.slowness(each) or 1.0) for each in entries)
        if self.bench.elapsed() + cost <= end:
            return True
        self.is_cut = True
        return False

    def _round(self, entries: Sequence[Candidate], images: int, end: float, is_final: bool = False) -> bool:
        """Measure the base and the entries, one after the other. Returns False if the time does not suffice.

        A final round is measured completely or not at all, in random order. In others the base comes first, so that
        all candidates that are still measured can be compared with it.
        """
        order = [BASE, *entries]
        if is_final:
            self.random.shuffle(order)
            if not self._fits(order, images, end):
                return False
        elif not self._fits(order[:2], images, end):
            return False
        self.trials.open(images, is_final)
        for candidate in order:
            if not is_final and candidate != BASE and not self._fits([candidate], images, end):
                return False
            if (known := self.trials.known.get(candidate)) is None or known.lost is None:
                self._measure(candidate, images)
        return True

    def _rounds(self, entries: Sequence[Candidate], images: int, end: float) -> bool:
        """Rounds of a few entries each. Returns False if the time does not suffice for all."""
        return all(
            self._round(entries[start : start + BESIDE_BASE], images, end)
            for start in range(0, len(entries), BESIDE_BASE)
        )

    def singles(self) -> list[Candidate]:
        """One change each: the first of every axis, then the second of every axis, and so on."""
        longest = max(map(len, self.axes.values()), default=0)
        return [
            Candidate(((axis, words[place]),))
            for place in range(longest)
            for axis, words in self.axes.items()
            if place < len(words)
        ]

    def _screen(self, end: float) -> None:
        field = [each for each in self.singles() if self.allowed(each) and not self.trials.is_measured(each)]
        changes = f"{log.quantity(len(field), 'change')} {'is' if len(field) == 1 else 'are'}"
        self.bench.tell(f"{changes} measured alone, on {log.quantity(self.counts[0], 'image')} each")
        self._rounds(field, self.counts[0], end)

    def _halve(self) -> None:
        field = self.surrogate.combinations(self.axes, QUALITY_SLACK)
        field = [each for each in field if len(each.changes) > 1 or self.trials.keeps(each)]
        rungs, end = self.counts[1:-1] or self.counts[-1:], self._ends("halving")
        typical = [[self.trials.cost(each, count) for each in field[:BESIDE_BASE]] for count in rungs]
        costs = [(1 + 1 / BESIDE_BASE) * sum(each) / len(each) for each in typical if each]
        most = max(entrants(end - self.bench.elapsed(), costs, MOST_ENTRANTS), FINALISTS)
        starting = self._first_allowed(field, most)
        self.promising = field
        if starting:
            self.bench.tell(f"{len(starting)} of {len(field)} promising combinations take part in the halving")
        halve(starting, rungs, lambda entries, count: self._rounds(entries, count, end), self.trials.fastest, FINALISTS)

    def _first_allowed(self, field: Iterable[Candidate], most: int) -> list[Candidate]:
        found = list[Candidate]()
        for each in field:
            if len(found) == most:
                break
            if self.allowed(each):
                found.append(each)
        return found

    def _finish(self) -> None:
        """Have the fastest generate the whole manifest until enough of them keep the bounds, then repeat these."""
        reserve = self._reserve()
        if reserve:
            self.bench.tell(f"The fastest of {len(reserve)} candidates generate all {self.bench.images} images")
        beside = [self.baseline] if self.baseline is not None else []
        if not reserve:
            self._final_round(beside, self.bench.images)
            reserve = self._reserve()
        while reserve and len(self._complete()) < FINALISTS:
            following = self._still_keeping(reserve[:FINALISTS])
            if following:
                goes_on = self._final_round([*following, *beside], self.bench.images)
                if not goes_on and not self._final_round(following[:1], self.bench.images):
                    return
                beside = []
            reserve = self._reserve()
        self._repeat(LEAST_OBSERVATIONS)

    def _reserve(self) -> list[Candidate]:
        """The candidates that keep the bounds and have not generated the whole manifest, the fastest first: those that
        are faster than the base, or all if the base breaks a bound, and first those that are closer to the reference.
        """
        if self.trials.breaks(BASE) and any([self.allowed(each) for each in list(self.slower)]):  # noqa: C419 - each is asked
            now = self.bench.elapsed()
            self._screen(now + (self.budget - now) / 2)  # the rest is for whole manifests
        found = [each for each in self.trials.fastest(list(self.trials.known)) if each != BASE]
        found = [each for each in found if self.trials.known[each].images < self.bench.images]
        if not self.trials.breaks(BASE):
            return [each for each in found if (self.trials.shift(each) or 0.0) < 0]
        if self.trials.known[BASE].broken is CandidateVerdict.BELOW:
            # what is no closer to the reference than the base breaks the bound too
            found.sort(key=lambda each: not self.trials.is_closer(each, BASE, GAIN))
        return found

    def _still_keeping(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that keep the bounds on more than the first images, which costs less than all images."""
        few = [each for each in candidates if self.trials.known[each].images < self.timed]
        if few:
            self._round(few, self.timed, self.budget)
        return [each for each in candidates if self.trials.keeps(each)]

    def _final_round(self, entries: Sequence[Candidate], images: int) -> bool:
        return self._round(entries, images, self.budget, is_final=True)

    def _complete(self) -> list[Candidate]:
        return [each for each in self.trials.complete(self.bench.images) if each != BASE]

    def _repeat(self, observations: int, beside: Sequence[Candidate] = ()) -> bool:
        """Rounds with the best ones until each has enough observations. Returns False if the time does not suffice."""
        entries = list(dict.fromkeys([*self._complete()[:FINALISTS], *beside]))
        entries = [each for each in entries if self.trials.keeps(each)]
        entries += [self.baseline] if self.baseline is not None else []
        while entries and min(map(self._observations, [BASE, *entries])) < observations:
            if not self._final_round(entries, self.timed):
                return False
        return True

    def _observations(self, candidate: Candidate) -> int:
        """Final rounds that the candidate took part in; enough for one that cannot be measured."""
        known = self.trials.known.get(candidate)
        if known is not None and known.lost is not None:
            return MOST_OBSERVATIONS
        return sum(candidate in each.seconds for each in self.trials.rounds if each.is_final)

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Candidates that were not measured and differ in one axis, the most promising first."""
        order, found = list(self.axes), list[Candidate]()
        for axis, all_words in self.axes.items():
            words = [word for word in all_words if not self._is_lost(Candidate(((axis, word),)))]
            rest = [change for change in candidate.changes if change[0] != axis]
            for change in [None, *((axis, word) for word in words)]:
                changes = sorted([*rest, *([change] if change else [])], key=lambda item: order.index(item[0]))
                found.append(replace(candidate, changes=tuple(changes)))
        new = [each for each in dict.fromkeys(found) if each not in self.trials.known]
        predicted = {each: self.surrogate.predict(each) for each in new}
        least = self.trials.bounds.psnr - QUALITY_SLACK
        return sorted((each for each in new if predicted[each].psnr >= least), key=lambda each: predicted[each].shift)

    def _is_lost(self, candidate: Candidate) -> bool:
        return candidate in self.trials.known and self.trials.known[candidate].lost is not None

    def _refine(self) -> None:
        """Move to a better neighbour of the best candidates as long as there is one and time is left."""
        while (leader := self.leader) is not None:
            best = self.trials.complete(self.bench.images)[:FINALISTS]
            near = [near for each in best for near in self.neighbours(each) if self.allowed(near)]
            better, left = list[Candidate](), list(dict.fromkeys(near))
            while left and not better:
                chunk, left = left[: BESIDE_BASE - 1], left[BESIDE_BASE - 1 :]
                if not self._round([leader, *chunk], self.timed, self.budget):
                    return
                better = [each for each in chunk if self.trials.keeps(each) and self._is_better(each, leader)]
            if not better or not self._final_round([leader, *better], self.bench.images):
                return
            if not self._repeat(LEAST_OBSERVATIONS, [leader, *better]):
                return

    def _is_better(self, candidate: Candidate, leader: Candidate) -> bool:
        """Whether a candidate may be faster than the leader, or is simpler and hardly slower."""
        found = self.trials.difference(leader, candidate)
        allowance = SIMPLER if len(candidate.changes) < len(leader.changes) else 0.0
        return found is not None and found.shift < allowance

    def _resolve(self) -> None:
        """More rounds while candidates are tied that may differ."""
        while True:
            tied = self.tied
            open_ones = [each for each in tied[1:] if not self.trials.are_equal(tied[0], each)]
            if not open_ones or min(map(self._observations, tied)) >= MOST_OBSERVATIONS:
                return
            entries = [each for each in tied[: FINALISTS + 1] if each != BASE]
            entries += [self.baseline] if self.baseline is not None else []
            if not self._final_round(entries, self.timed):
                return
