"""The verdict of a report in words: the fastest cell, by how much, at which quality and memory, and what failed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_gen import log
from sglang_gen.perf.attributes import percent
from sglang_gen.perf.statistics import MOST_REPEATS, Judgement, Verdict, geometric_mean, judge
from sglang_gen.report import interactions
from sglang_gen.report.cell_metrics import MEMORY_NAMES, Metrics, frontier

TOLERANCE = 0.02  # cells whose times differ by less are called equally fast


@dataclass(frozen=True)
class Conclusion:
    """`headline` is one sentence, `details` are further sentences."""

    headline: str
    details: tuple[str, ...] = ()


def conclude(found: Sequence[Metrics], memory: str | None) -> Conclusion:
    """The verdict on the cells; `memory` is the column of `MEMORY_NAMES` that was measured."""
    timed = sorted((one for one in found if one.time is not None), key=lambda one: geometric_mean(one.cell.seconds))
    ended = _not_completed(found)
    if not timed:
        return Conclusion(_nothing_timed(found), ended)
    if len(timed) == 1:
        only = f"{timed[0].cell.short} takes {per_image(timed[0])}; no other cell was measured."
        return Conclusion(only, (*_properties(timed[0], memory), *ended))
    headline, hint, tied = _fastest(timed)
    first = next(one for one in found if one.time is not None)
    speed_up = "" if first is timed[1] and not tied else _against_first(first, timed[0], bool(tied))
    together = interactions.sentences(interactions.interactions(found))
    details = [hint, speed_up, *_properties(timed[0], memory), *_trade(timed), *together]
    return Conclusion(headline, tuple(sentence for sentence in (*details, *ended) if sentence))


def _nothing_timed(found: Sequence[Metrics]) -> str:
    statuses = Counter(one.cell.row.status for one in found)
    if statuses["planned"] == len(found):
        return f"Nothing was run: all {len(found)} cells were planned only (dry_run=true)."
    if not statuses["completed"]:
        return "No cell completed, so there is nothing to compare."
    return "No cell has a perf dump with times, so there is nothing to compare."


def _fastest(timed: Sequence[Metrics]) -> tuple[str, str, list[Metrics]]:
    """The headline, a hint, and the cells that cannot be told from the fastest. `timed` is in the order of times."""
    best, second = timed[:2]
    judgements = [judge(best.cell.seconds, one.cell.seconds, TOLERANCE) for one in timed[1:]]
    nearest, margin = judgements[0], f"the next is {second.cell.short}"
    if nearest.interval is None:
        hint = (
            f"Each cell was timed once, so this may be chance: {margin}, {_longer(nearest)}. Repeat with perf.repeat=5."
        )
        return f"{best.cell.short} was fastest: {per_image(best)}.", hint, []
    tied = [one for one, judged in zip(timed[1:], judgements, strict=True) if judged.verdict is not Verdict.REGRESSION]
    if not tied:
        return f"{best.cell.short} is fastest: {per_image(best)}.", f"{_capital(margin)}, {_longer(nearest)}.", []
    noisy = [judged for judged in judgements if judged.verdict is Verdict.TOO_NOISY]
    names = _list([best.cell.short, *(one.cell.short for one in tied)])
    if not noisy:
        return (
            f"{names} are equally fast: {per_image(best)}.",
            f"Their times differ by less than {100 * TOLERANCE:.0f} %.",
            tied,
        )
    needed = max(judged.repeats_needed or 0 for judged in noisy)
    count = f"More than {MOST_REPEATS}" if needed >= MOST_REPEATS else f"About {needed}"
    hint = f"{count} repeats per cell would tell times that differ by {100 * TOLERANCE:.0f} % apart (perf.repeat)"
    hint += "; fewer on an idle machine."
    return f"Too noisy to tell which is fastest: {names}.", hint, tied


def _against_first(first: Metrics, best: Metrics, is_tied: bool) -> str:
    """The speed-up of the fastest cell over the first one, which sweeps use as their baseline."""
    if first is best:
        return "" if is_tied else "It is the first cell, the baseline of this sweep."
    judged = judge(best.cell.seconds, first.cell.seconds, TOLERANCE)
    interval = "" if judged.interval is None else f" (95 % interval {_times(judged.interval)})"
    subject = f"The lowest mean, that of {best.cell.short}," if is_tied else "It"
    return f"{subject} is {judged.ratio:.3g} times as fast as the first cell, {first.cell.short}{interval}."


def _properties(one: Metrics, memory: str | None) -> list[str]:
    sentences = []
    if one.is_reference:
        sentences.append(f"The images of {one.cell.short} are the reference of the others.")
    elif one.psnr is not None:
        similar = "" if one.ssim is None else f", SSIM {one.ssim:.4f}"
        quality = f"Its images have {one.psnr:.1f} dB PSNR{similar} against the reference."
        sentences.append("Its images are identical to the reference." if math.isinf(one.psnr) else quality)
    if one.attributes is not None:
        other = one.reference_attributes
        beside = "" if other is None else f", and those of the reference {percent(other)}"
        sentences.append(
            f"Its images show {percent(one.attributes)} of the attributes that their prompts name{beside}."
        )
    if one.memory is not None and memory is not None:
        sentences.append(f"Its peak of {MEMORY_NAMES[memory]} is {mebibytes(one.memory)}.")
    return sentences


def _trade(timed: Sequence[Metrics]) -> list[str]:
    """The cells on the frontier of time and quality, if quality was measured and there is a choice."""
    rated = [one for one in timed if one.psnr is not None and one.time is not None]
    chosen = frontier([(one.time.median, -(one.psnr or 0.0)) for one in rated if one.time is not None])
    if len(rated) < 3 or len(chosen) < 2:
        return []
    return [
        f"No other cell is both faster and closer to the reference than {_list([rated[i].cell.short for i in chosen])}."
    ]


def _not_completed(found: Sequence[Metrics]) -> tuple[str, ...]:
    lost = [one.cell.row for one in found if one.cell.row.status not in ("completed", "planned")]
    if not lost:
        return ()
    counts = Counter(row.status for row in lost)
    words = _list([f"{count} {status}" for status, count in counts.items()])
    reasons = {row.error for row in lost}
    reason = reasons.pop() if len(reasons) == 1 else None
    end = "; the table gives the reasons." if reason is None else f": {log.visible(log.shorten(reason, 300))}."
    return (f"{len(lost)} of {len(found)} cells did not complete ({words}){end}",)


def _list(names: Sequence[str], most: int = 6) -> str:
    """`a, b and c`; at most `most` names."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _longer(judged: Judgement) -> str:
    """How much longer the other cell takes: `which takes 12 % longer (95 % interval 5 to 19 %)`."""
    if judged.ratio >= 2:
        interval = "" if judged.interval is None else f" (95 % interval {_times(judged.interval)})"
        return f"which takes {judged.ratio:.3g} times as long{interval}"
    interval = ""
    if judged.interval is not None:
        low, high = (100 * (end - 1) for end in judged.interval)
        interval = f" (95 % interval {low:.2g} to {high:.2g} %)"
    return f"which takes {100 * (judged.ratio - 1):.2g} % longer{interval}"


def _capital(clause: str) -> str:
    return clause[0].upper() + clause[1:]


def _times(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3g} to {interval[1]:.3g}"


def per_image(one: Metrics) -> str:
    """Time of one image with its interval, such as `154 ms (148 to 160) per image`."""
    assert one.time is not None
    return f"{duration(one.time.median, one.time.low, one.time.high)} per image"


def duration(median: float, low: float | None = None, high: float | None = None) -> str:
    """Seconds as text in s or ms, with three significant digits, and the interval in the same unit."""
    factor, unit = (1, "s") if median >= 1 else (1000, "ms")
    text = f"{_three(median * factor)} {unit}"
    if low is None or high is None:
        return text
    return f"{text} ({_three(low * factor)} to {_three(high * factor)})"


def _three(value: float) -> str:
    """Three significant digits without exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 1e-3 else "0.001"


def mebibytes(value: float) -> str:
    return f"{value / 1024:.3g} GiB" if value >= 10_240 else f"{value:.0f} MiB"
