"""Predicts a combination of changes from the measurements of each change alone.

The logarithms of times add up, and so do the squared errors of images: changes are taken to be independent. The
prediction decides only in which order combinations are measured, and which of them are not worth it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang_gen.tune.candidate import BASE, Candidate
from sglang_gen.tune.trials import Trials

MOST_PER_AXIS = 4  # changes of one axis that are combined with those of the others
MOST_COMBINATIONS = 2000  # that are kept while axes are multiplied
GAIN = 1.0  # dB by which a slower change must be closer to the reference to be combined


@dataclass(frozen=True)
class Prediction:
    """log(time / time of the base), and PSNR of the worst image in dB."""

    shift: float
    psnr: float


class Surrogate:
    """Predictions from what `trials` has measured so far."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials

    def predict(self, candidate: Candidate) -> Prediction:
        """The prediction; a change that was not measured alone counts as none."""
        known = [one for one in candidate.singles if self.trials.is_measured(one)]
        base = _error(self._psnr(BASE))
        added = [_error(self._psnr(one)) - base for one in known]
        # a change that lowers the error of the base cannot lower that of another change
        error = max(base + sum(added), *(each for each in added if each > 0), 0.0) if added else base
        return Prediction(sum(self._shift(one) for one in known), _psnr_of(error))

    def _psnr(self, candidate: Candidate) -> float:
        return self.trials.known[candidate].psnr if self.trials.is_measured(candidate) else math.inf

    def _shift(self, candidate: Candidate) -> float:
        return self.trials.shift(candidate) or 0.0

    def useful(self, axis: str, words: Sequence[str], slack: float) -> list[Candidate]:
        """Changes of an axis that are faster than the base, clearly closer to the reference, or keep a bound that the
        base breaks, the fastest first.

        Those that another change of the axis beats in both are left out, unless they alone keep the bound of memory,
        and those that are further than `slack` dB below the bound, or below the base if it breaks the bound itself.
        """
        singles = [one for word in words if self.trials.is_measured(one := Candidate(((axis, word),)))]
        found = sorted((one for one in singles if self.trials.known[one].lost is None), key=self._shift)
        base, best, chosen = self._psnr(BASE), -math.inf, list[Candidate]()
        least = min(self.trials.bounds.psnr, base) - slack
        saving = [one for one in found if self._saves_memory(one)]
        for one in (*saving, *(one for one in found if one not in saving)):
            psnr = self._psnr(one)
            if psnr < least or (psnr <= best and one not in saving):
                continue
            if self._shift(one) < 0 or psnr > base + GAIN or (self.trials.breaks(BASE) and self.trials.keeps(one)):
                best = max(psnr, best) if one not in saving else best
                chosen.append(one)
        return chosen[:MOST_PER_AXIS]

    def _saves_memory(self, single: Candidate) -> bool:
        """Whether a change alone keeps the bound of memory, which the base breaks."""
        base, own = self._known_memory(BASE), self._known_memory(single)
        return base is not None and own is not None and base > self.trials.bounds.memory >= own

    def combinations(self, axes: Mapping[str, Sequence[str]], slack: float) -> list[Candidate]:
        """Products of useful changes that are predicted to be faster than the base and not further than `slack` dB
        below the bound, the fastest first. Single changes are among them.

        If the base breaks a bound, slower products are among them too; if it takes too much memory, only those with a
        change that saves enough.
        """
        base, order = self._psnr(BASE), list(axes)
        least = self.trials.bounds.psnr - slack
        useful = {axis: self.useful(axis, words, slack) for axis, words in axes.items()}
        mending = [axis for axis in order if base < least and any(self._psnr(one) > base for one in useful[axis])]
        found = {BASE: Prediction(0.0, base)}
        for axis in (*mending, *(axis for axis in order if axis not in mending)):
            bound = -math.inf if axis in mending[:-1] else least
            longer = [_with(each, one, order) for each in found for one in useful[axis]]
            found |= {each: self.predict(each) for each in longer}
            found = {each: one for each, one in found.items() if one.psnr >= bound}
            found = dict(sorted(found.items(), key=_order)[:MOST_COMBINATIONS])
        most = math.inf if self.trials.breaks(BASE) else 0.0
        saving = [one for axis in order for one in useful[axis] if self._saves_memory(one)]
        memory = self._known_memory(BASE)
        over = memory is not None and memory > self.trials.bounds.memory
        return [
            each for each, one in found.items()
            if each != BASE and one.shift < most and (not over or any(single in saving for single in each.singles))
        ]  # fmt: skip

    def _known_memory(self, candidate: Candidate) -> float | None:
        trial = self.trials.known.get(candidate)
        return None if trial is None else trial.memory


def _with(candidate: Candidate, single: Candidate, order: Sequence[str]) -> Candidate:
    """The candidate with one more change, its changes in the order of the axes."""
    changes = (*candidate.changes, *single.changes)
    return Candidate(tuple(sorted(changes, key=lambda change: order.index(change[0]))))


def _order(item: tuple[Candidate, Prediction]) -> tuple[float, int]:
    candidate, prediction = item
    return prediction.shift, len(candidate.changes)


def _error(psnr: float) -> float:
    """The squared error of a PSNR, relative to the squared peak."""
    return 0.0 if math.isinf(psnr) else 10 ** (-psnr / 10)


def _psnr_of(error: float) -> float:
    return math.inf if error <= 0 else -10 * math.log10(error)
