"""What a search found: a row for each candidate with its verdict, and the content of tune.json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_gen.log import shorten
from sglang_gen.perf.log_ratio import exp
from sglang_gen.report.cell_metrics import frontier
from sglang_gen.tune.candidate import BASE, Candidate, CandidateVerdict
from sglang_gen.tune.search import Search
from sglang_gen.tune.trials import CONFIDENCE, Round, Trial


@dataclass(frozen=True)
class CandidateRow:
    """A candidate as the table and tune.json show it. Ratios are times of the base over those of the candidate."""

    candidate: Candidate
    verdict: CandidateVerdict
    reason: str | None = None
    images: int = 0
    speed_up: float | None = None
    interval: tuple[float, float] | None = None
    observations: int = 0  # rounds behind the speed-up
    psnr: float | None = None  # of the worst image; infinite if all are identical
    worst: Any = None
    memory: float | None = None
    job: int | None = None  # number of its folder
    on_front: bool = False  # no candidate on the whole manifest is both faster and closer to the reference

    def as_dict(self) -> dict[str, Any]:
        finite = self.psnr is not None and math.isfinite(self.psnr)
        return {
            "job": self.job,
            "overrides": list(self.candidate.words),
            "changes": dict(self.candidate.changes),
            "verdict": self.verdict,
            "reason": self.reason,
            "images": self.images,
            "speed_up": self.speed_up and round(self.speed_up, 4),
            "interval": self.interval and [round(end, 4) for end in self.interval],
            "observations": self.observations,
            "psnr": round(self.psnr, 4) if self.psnr is not None and finite else None,
            "identical": self.psnr is not None and math.isinf(self.psnr),
            "worst": self.worst,
            "memory_bytes": self.memory and round(self.memory),
            "pareto": self.on_front,
        }


def candidate_rows(search: Search) -> list[CandidateRow]:
    """The base, the baseline and all candidates: those measured on the whole manifest first, the fastest first."""
    chosen, tied = search.chosen, search.tied
    verdicts = {each: CandidateVerdict.CHOSEN if each == chosen else CandidateVerdict.TIED for each in tied}
    rows = [_row(search, each, trial, verdicts) for each, trial in search.trials.known.items()]
    rows += [
        CandidateRow(each, CandidateVerdict.UNMEASURED) for each in search.singles() if each not in search.trials.known
    ]
    rows.sort(key=lambda row: (-row.images, -(row.speed_up or 0.0)))
    whole = [place for place, row in enumerate(rows) if row.images == search.bench.images and row.speed_up is not None]
    front = {whole[place] for place in frontier([_point(rows[place]) for place in whole])}
    return [_marked(row, place in front) for place, row in enumerate(rows)]


def _point(row: CandidateRow) -> tuple[float, float]:
    """Relative time and negative PSNR: lower is better in both."""
    assert row.speed_up is not None
    return 1 / row.speed_up, -math.inf if row.psnr is None else -row.psnr


def _marked(row: CandidateRow, on_front: bool) -> CandidateRow:
    return CandidateRow(**{**vars(row), "on_front": on_front})


def _row(
    search: Search, candidate: Candidate, trial: Trial, verdicts: dict[Candidate, CandidateVerdict]
) -> CandidateRow:
    found = search.trials.difference(BASE, candidate)
    interval = None if found is None or candidate == BASE else found.interval(CONFIDENCE)
    verdict, reason = _verdict(search, candidate, trial, verdicts)
    return CandidateRow(
        candidate,
        verdict,
        reason,
        images=trial.images,
        speed_up=None if found is None else exp(-found.shift),
        interval=None if interval is None else (1 / interval[1], 1 / interval[0]),
        observations=len(search.trials.shared(BASE, candidate)),
        psnr=trial.psnr if trial.images else None,
        worst=trial.worst,
        memory=trial.memory,
        job=search.bench.jobs.get(candidate),
    )


def _verdict(
    search: Search, candidate: Candidate, trial: Trial, verdicts: dict[Candidate, CandidateVerdict]
) -> tuple[CandidateVerdict, str | None]:
    if trial.lost is not None:
        return trial.lost
    if candidate.is_baseline:
        return CandidateVerdict.BASELINE, None
    if trial.broken is not None:
        return trial.broken, None
    if candidate in verdicts:
        return verdicts[candidate], None
    if candidate == BASE:
        return CandidateVerdict.BASE, None
    if trial.images == search.bench.images:
        return CandidateVerdict.KEPT, None
    shift, least = search.trials.shift(candidate), None if search.leader is None else search.trials.shift(search.leader)
    might_win = search.is_cut and shift is not None and (least is None or shift < least)
    return CandidateVerdict.UNFINISHED if might_win else CandidateVerdict.SLOW, None


def image_name(worst: Any) -> str:
    """`image 3, 'a lake ...'` of the entry `worst` of a dump."""
    return "" if not worst else f"image {worst['index']}, '{shorten(str(worst['prompt']), 40)}'"


def outcome_dict(search: Search, rows: Sequence[CandidateRow], about: dict[str, Any]) -> dict[str, Any]:
    """The content of tune.json; `about` is what only the command knows."""
    bounds, against = search.trials.bounds, against_baseline(search)
    return {
        **about,
        "min_psnr": bounds.psnr,
        "max_memory_bytes": None if math.isinf(bounds.memory) else bounds.memory,
        "budget_s": search.budget,
        "spent_s": round(search.bench.elapsed(), 1),
        "budget_ended_the_search": search.is_cut,
        "combinations_left_out": search.unmeasured,
        "images": search.bench.images,
        "axes": {axis: list(words) for axis, words in search.axes.items()},
        "chosen": None if search.chosen is None else list(search.chosen.words),
        "tied": [list(each.words) for each in search.tied],
        "against_baseline": against and {"speed_up": round(against[0], 4), "interval": against[1]},
        "candidates": [row.as_dict() for row in rows],
        "rounds": [_round_dict(each) for each in search.trials.rounds],
    }


def _round_dict(one: Round) -> dict[str, Any]:
    seconds = {str(candidate): round(value, 6) for candidate, value in one.seconds.items()}
    return {"images": one.images, "final": one.is_final, "seconds": seconds}


def against_baseline(search: Search) -> tuple[float, tuple[float, float] | None] | None:
    """How many times as fast as the baseline the chosen candidate is, with its interval."""
    if search.baseline is None or search.chosen is None:
        return None
    found = search.trials.difference(search.chosen, search.baseline)
    return None if found is None else (exp(found.shift), found.interval(CONFIDENCE))
