"""Synthetic surfaces of time and quality over the axes of a search, with a clock of their own."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence

from sglang_gen.tune.candidate import Candidate, CandidateError, CandidateVerdict, Observation

AXES: dict[str, Sequence[str]] = {
    "dtype": ("dtype=float32", "dtype=float16"),
    "compile": ("compile=regional", "compile=full"),
    "cache": ("cache=dbcache", "cache=scm_fast", "cache=scm_slow"),
    "guidance": ("g=0.8", "g=0.6", "g=0.5", "g=0.4"),
    "layout": ("parallel=tp2", "parallel=sp2"),
}


def products(axes: Mapping[str, Sequence[str]] = AXES) -> list[Candidate]:
    choices = [[(), *(((axis, word),) for word in words)] for axis, words in axes.items()]
    return [Candidate(tuple(change for part in parts for change in part)) for parts in itertools.product(*choices)]


class CostSurface:
    """Logarithms of times and squared errors of images add up over the changes, apart from `interactions`.

    A surface without `shifts` draws them, and the interactions of a few pairs. `noise` is the standard deviation of
    the logarithm of a measured time.
    """

    def __init__(self, seed: int = 0, noise: float = 0.0, images: int = 16, least_psnr: float = 34.0) -> None:
        drawn = random.Random(seed)
        self.images, self.noise, self.random = images, noise, random.Random(seed + 1000)
        self.least_psnr, self.now, self.lines = least_psnr, 0.0, list[str]()
        changes = [(axis, word) for axis, words in AXES.items() for word in words]
        self.shifts = {change: drawn.uniform(-0.5, 0.25) for change in changes}
        self.errors = {change: drawn.choice([0, 0, 1]) * 10 ** (-drawn.uniform(33, 44) / 10) for change in changes}
        self.interactions: dict[frozenset[tuple[str, str]], float] = {}
        for _ in range(6):
            pair = drawn.sample(changes, 2)
            if pair[0][0] != pair[1][0]:
                self.interactions[frozenset(pair)] = drawn.uniform(-0.15, 0.15)
        self.base_error = 10 ** (-drawn.uniform(37, 44) / 10)
        self.hardness = [drawn.uniform(0.3, 1.0) for _ in range(images)]  # of each image
        self.memory: dict[tuple[str, str], float] = {}
        self.jobs: dict[Candidate, int] = {}
        self.refused: dict[Candidate, str] = {}
        self.slower: dict[Candidate, float] = {}  # how much slower a change is predicted to be
        self.failing: set[Candidate] = set()
        self.measured: list[tuple[Candidate, int]] = []
        self.seconds, self.overhead = 0.8, 2.0  # of an image of the base, and of every measurement

    def time(self, candidate: Candidate) -> float:
        """The true seconds of an image."""
        changes = set(candidate.changes)
        shift = sum(self.shifts.get(change, 0.0) for change in changes)
        shift += sum(value for pair, value in self.interactions.items() if pair <= changes)
        return self.seconds * math.exp(shift)

    def psnr(self, candidate: Candidate, images: int | None = None) -> float:
        error = self.base_error + sum(self.errors.get(change, 0.0) for change in candidate.changes)
        return -10 * math.log10(error * max(self.hardness[:images]))

    def optimum(self) -> Candidate:
        """The fastest of all products that keeps the bound over all images."""
        allowed = [each for each in products() if self.psnr(each) >= self.least_psnr and each not in self.refused]
        return min(allowed, key=lambda each: (self.time(each), len(each.changes)))

    def refusal(self, candidate: Candidate) -> str | None:
        return self.refused.get(candidate)

    def slowness(self, candidate: Candidate) -> float | None:
        return next((ratio for one, ratio in self.slower.items() if set(one.changes) <= set(candidate.changes)), None)

    def measure(self, candidate: Candidate, images: int) -> Observation:
        self.jobs.setdefault(candidate, len(self.jobs))
        self.measured.append((candidate, images))
        seconds = self.time(candidate) * math.exp(self.random.gauss(0, self.noise))
        wall = self.overhead + images * seconds
        self.now += wall
        if candidate in self.failing:
            raise CandidateError(CandidateVerdict.FAILED, "memory ran out")
        memory = 1e9 + sum(self.memory.get(change, 0.0) for change in candidate.changes)
        worst = {"index": max(range(images), key=self.hardness.__getitem__), "prompt": "a lake", "seed": 0}
        return Observation(seconds, self.psnr(candidate, images), memory, wall, worst=worst)

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def elapsed(self) -> float:
        return self.now
