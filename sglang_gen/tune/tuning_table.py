"""The table of a search in the width of the terminal, and the sentences below it."""

import math
from collections.abc import Iterator, Sequence

from sglang_gen import log
from sglang_gen.sweep.columns import Column, escaped, fit, render, wrapped
from sglang_gen.tune.candidate import BASE, Candidate, CandidateVerdict
from sglang_gen.tune.outcome import CandidateRow, against_baseline, candidate_rows, image_name
from sglang_gen.tune.search import Search

MOST_NAMED = 6  # candidates with one reason
SAME = "it is the same as "  # reasons of candidates that nobody misses in the table


def table_lines(search: Search, rows: Sequence[CandidateRow], limit: int) -> list[str]:
    """The measured candidates as a Markdown table, and below it the others with their reasons."""
    shown = [row for row in rows if row.images]
    columns = [
        Column("job", ["" if row.job is None else str(row.job) for row in shown]),
        Column("candidate", [short_name(row.candidate) for row in shown], 0, True),
        Column("speed-up", [_speed_up(row) for row in shown], 10, False, [_speed_up(row, True) for row in shown], 70),
        Column("worst PSNR (dB)", [_psnr(row, search.bench.images) for row in shown], 20),
        Column("memory (MiB)", [_memory(row) for row in shown], 60),
        Column("verdict", [f"{row.verdict}{' *' if row.on_front else ''}" for row in shown], 0),
    ]
    fitted, left_out = fit(columns, limit)
    lines = [*render(fitted), ""]
    for sentence in (*_names(shown, fitted[1].cells), *_below(search, rows, shown, left_out)):
        lines += wrapped(f"- {sentence}", limit, "  ")
    return lines


def _names(shown: Sequence[CandidateRow], cells: Sequence[str]) -> Iterator[str]:
    """The candidates whose names are shortened in the table."""
    for row, cell in zip(shown, cells, strict=True):
        if "…" in cell:
            yield escaped(f"{row.job}: {short_name(row.candidate)}")


def short_name(candidate: Candidate) -> str:
    """The candidate with keys that lack their group, such as guidance_interval=[0,0.6]."""
    return " ".join(word if "=" not in word else f"{word.partition('=')[0].rpartition('.')[2]}={word.partition('=')[2]}"
                    for word in str(candidate).split(" "))  # fmt: skip


def _speed_up(row: CandidateRow, is_brief: bool = False) -> str:
    if row.speed_up is None:
        return ""
    interval = "" if row.interval is None or is_brief else f" ({row.interval[0]:.2f} to {row.interval[1]:.2f})"
    return f"{row.speed_up:.2f}x{interval}"


def _psnr(row: CandidateRow, images: int) -> str:
    """The worst image so far; with the number of images if these are not all."""
    if row.psnr is None:
        return ""
    text = "identical" if math.isinf(row.psnr) else f"{row.psnr:.2f}"
    return text if row.images == images else f"{text} of {row.images}"


def _memory(row: CandidateRow) -> str:
    return "" if row.memory is None else f"{row.memory / 2**20:.4g}"


def _below(
    search: Search, rows: Sequence[CandidateRow], shown: Sequence[CandidateRow], left_out: Sequence[str]
) -> Iterator[str]:
    if any(row.images < search.bench.images for row in shown):
        yield (
            f"`of N`: the worst of the first N of {search.bench.images} images; the candidate was dropped before it "
            "generated all"
        )
    if any(row.on_front for row in shown):
        yield "`*`: no other candidate with all images is both faster and closer to the reference"
    if left_out:
        yield f"only in tune.json: {', '.join(left_out)}"
    below = [row for row in shown if row.verdict == CandidateVerdict.BELOW and row.worst]
    if below:
        closest = max(below, key=lambda row: row.psnr or 0.0)
        yield escaped(f"the closest below the bound: {closest.candidate} ({image_name(closest.worst)})")
    for reason, names in _by_reason(rows, search.is_interrupted).items():
        more = f" and {log.quantity(len(names) - MOST_NAMED, 'other')}" if len(names) > MOST_NAMED else ""
        yield escaped(f"{', '.join(names[:MOST_NAMED])}{more}: {reason}")


def _by_reason(rows: Sequence[CandidateRow], is_interrupted: bool) -> dict[str, list[str]]:
    """Names of candidates by the reason why they have no measurement; of refused ones the options alone."""
    found: dict[str, list[str]] = {}
    for row in rows:
        is_lost = row.verdict in (CandidateVerdict.REFUSED, CandidateVerdict.FAILED)
        if row.verdict == CandidateVerdict.UNMEASURED:
            why = "the search was interrupted" if is_interrupted else "the budget was spent"
            found.setdefault(f"not measured, {why}", []).append(str(row.candidate))
        elif is_lost and row.reason and len(row.candidate.words) == 1 and not row.reason.startswith(SAME):
            found.setdefault(f"{row.verdict}: {row.reason}", []).append(str(row.candidate))
    return found


def conclusion_lines(search: Search, rows: Sequence[CandidateRow]) -> list[str]:
    """Sentences about the chosen candidate, or why there is none."""
    chosen = search.chosen
    if chosen is None:
        return [why_nothing(search)]
    row = next(row for row in rows if row.candidate == chosen)
    quality = "identical to the reference" if math.isinf(row.psnr or 0.0) else f"{row.psnr:.2f} dB"
    worst = f" ({image_name(row.worst)})" if row.worst else ""
    ratio = f"{_speed_up(row)} of the base{'' if row.interval else ' (measured too rarely for an interval)'}"
    lines = [f"Chosen: {chosen}: {ratio}, worst of {log.quantity(search.bench.images, 'image')} {quality}{worst}"]
    if chosen == Candidate():
        lines = [f"No candidate is faster than the base and keeps {search.trials.bounds.psnr:g} dB"]
    base = next(row for row in rows if row.candidate == BASE)
    if base.verdict in (CandidateVerdict.BELOW, CandidateVerdict.OVER):
        lines.append(f"The base does not keep the bounds ({base.verdict}): {_measured(base)}")
    others = [each for each in search.tied if each != chosen]
    for more, why in ((True, "chosen against because of more changes"), (False, "measured slower")):
        if named := [str(each) for each in others if (len(each.changes) > len(chosen.changes)) == more]:
            lines.append(f"Tied with it, and {why}: {'; '.join(named)}")
    if (against := against_baseline(search)) is not None:
        interval = "" if against[1] is None else f" ({against[1][0]:.2f} to {against[1][1]:.2f})"
        lines.append(f"{against[0]:.2f} times as fast as the {search.baseline}{interval}")
    if search.is_cut:
        changes = sum(row.verdict == CandidateVerdict.UNMEASURED for row in rows)
        left = [log.quantity(number, noun) for number, noun in
                ((changes, "change"), (search.unmeasured, "promising combination")) if number]  # fmt: skip
        before = f" before {' and '.join(left)} had been measured" if left else ""
        lines.append(f"The budget ended the search{before}; a larger --budget tells more candidates apart")
    return lines


def why_nothing(search: Search) -> str:
    """Why no candidate is chosen."""
    rows = candidate_rows(search)
    whole = [row for row in rows if row.images == search.bench.images and not row.candidate.is_baseline]
    still_keeping = [each for each in search.trials.known if search.trials.keeps(each) and not each.is_baseline]
    if search.is_cut and (still_keeping or not whole):
        which = "the candidates that keep the bounds so far" if still_keeping and whole else "a candidate"
        return (
            f"The budget was spent before {which} had generated all {search.bench.images} images: raise --budget, or "
            "use a manifest with fewer prompts"
        )
    measured = [row for row in rows if row.psnr is not None and not row.candidate.is_baseline]
    bounds = search.trials.bounds
    if below := [row for row in measured if row.verdict == CandidateVerdict.BELOW]:
        best = max(below, key=lambda row: (row.images, row.psnr or 0.0))
        memory = "" if math.isinf(bounds.memory) else f" in {bounds.memory / 1e9:.3g} GB"
        return (
            f"No candidate keeps {bounds.psnr:g} dB{memory}: the worst of {log.quantity(best.images, 'image')} of "
            f"{best.candidate} has {best.psnr:.2f} dB; lower --min-psnr, or let the search change more axes"
        )
    if over := [row for row in measured if row.verdict == CandidateVerdict.OVER and row.memory is not None]:
        least = min(over, key=lambda row: row.memory or 0.0)
        return (
            f"No candidate keeps {bounds.memory / 1e9:.3g} GB: {least.candidate} takes the least, "
            f"{(least.memory or 0.0) / 1e9:.3g} GB; raise --max-memory, or let the search change more axes"
        )
    failed = [row for row in rows if row.verdict == CandidateVerdict.FAILED]
    return f"No candidate could be measured{f': {failed[0].candidate}: {failed[0].reason}' if failed else ''}"


def _measured(row: CandidateRow) -> str:
    quality = "identical to the reference" if math.isinf(row.psnr or 0.0) else f"{row.psnr:.2f} dB"
    memory = "" if row.memory is None else f", {row.memory / 1e9:.3g} GB"
    return f"the worst of {log.quantity(row.images, 'image')} {quality}{memory}"
