"""False alarm and miss rates of `sglang perf`, by bootstrapping recorded runs of one machine.

    python -m tools.perf_rates                              # the rates, from tools/perf_rates.json
    python -m tools.perf_rates record NAME FOLDER           # add the dumps of a folder to that file as a recording

Dumps are drawn in blocks of neighbors (D. N. Politis and J. P. Romano, "The stationary bootstrap", JASA 89, 1994; mean
length 5), so the drift of the machine stays in the samples. A false alarm is a REGRESSION, or a change of a history, of
an unchanged program. For the misses the new dumps are made slower by 10 %: `passed` are those that were called PASS or
IMPROVEMENT, and `not found` includes those that were TOO_NOISY; of a history, those whose change was not found at its
commit, `near` at a neighbor either.

Recordings with a calibration (perf.calibrate) are judged by `perf check` as the command does: by adjusted processor
time, and by total and step time where both sides are quiet. Pairs of such recordings are judged too, the baseline from
one and the new dumps from another, whose machine had other work to do at that time. The calibration and the constants
of `covariance` were chosen on the recording `chosen`; `later` was made after that.
"""

import argparse
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sglang_gen.perf.busy_machine import CPU, QUIET
from sglang_gen.perf.change_points import Change, Place, Rule, find
from sglang_gen.perf.compare import TOLERANCES
from sglang_gen.perf.covariance import adjusted, adjusted_pairs, at_one_speed
from sglang_gen.perf.dump_reader import CALIBRATION, collect
from sglang_gen.perf.log_ratio import Difference, Method
from sglang_gen.perf.statistics import Verdict, judge

FILE = Path(__file__).with_suffix(".json")
METRICS = ("total", "step", CPU, CALIBRATION)
SLOWDOWN = 1.1
BLOCK = 5  # mean length of a block of dumps
COMMITS = 30
NOISE_LEVELS = (0.08, 0.06, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.0075, 0.005)
MOST_ALARMS, MOST_LOST = 0.01, 0.05
TOLERANCE = TOLERANCES["total"].relative
Dump = dict[str, float]  # metric -> the observation of a dump, the geometric mean of its repeats
Series = list[float]
Sides = tuple[list[Dump], list[Dump]]
Draw = Callable[[random.Random], Sides]  # one sample of both sides
Decide = Callable[[list[Dump], list[Dump]], Verdict]


def record(name: str, folder: str) -> None:
    """Keep the values of dumps, in the order of time, and the facts of their machine."""
    dumps = sorted(collect([folder]), key=lambda dump: dump.origin.date or "")
    content = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    content[name] = {
        "model": dumps[0].meta["model"],
        "hardware": dumps[0].fields["hardware"],
        "steps": dumps[0].fields["steps"],
        "size": dumps[0].fields["size"],
        "dates": [dumps[0].origin.date, dumps[-1].origin.date],
        "dumps": [
            {metric: [round(value, 1 if value > 100 else 3) for value in dump.metrics[metric]]
             for metric in METRICS if metric in dump.metrics}
            for dump in dumps
        ],
    }  # fmt: skip
    lines = [json.dumps(value, separators=(",", ":")).replace('{"total"', '\n{"total"') for value in content.values()]
    text = ",\n".join(f"{json.dumps(key)}: {line}" for key, line in zip(content, lines, strict=True))
    FILE.write_text(f"{{{text}}}\n", encoding="utf-8")


def recordings(path: Path = FILE) -> dict[str, list[Dump]]:
    """Recording -> its dumps in the order of time."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [
            {metric: math.exp(fmean(map(math.log, values))) for metric, values in dump.items()}
            for dump in recorded["dumps"]
        ]
        for name, recorded in content.items()
    }


def resample(dumps: Sequence[Any], count: int, generator: random.Random) -> list[Any]:
    """A stationary bootstrap: runs of neighbors, around the end to the start, each with a random start and length."""
    found, at = [], generator.randrange(len(dumps))
    while len(found) < count:
        found.append(dumps[at])
        at = generator.randrange(len(dumps)) if generator.random() < 1 / BLOCK else (at + 1) % len(dumps)
    return found


def one_after_the_other(dumps: list[Dump], base: int, new: int) -> Draw:
    def draw(generator: random.Random) -> Sides:
        series = resample(dumps, base + new, generator)
        return series[:base], series[base:]

    return draw


def in_turn(dumps: list[Dump], pairs: int) -> Draw:
    def draw(generator: random.Random) -> Sides:
        series = resample(dumps, 2 * pairs, generator)
        return series[::2], series[1::2]

    return draw


def at_another_time(dumps: list[Dump], later: list[Dump], base: int, new: int) -> Draw:
    return lambda generator: (resample(dumps, base, generator), resample(later, new, generator))


def by_metric(metric: str, method: Method, confidence: float) -> Decide:
    def decide(base: list[Dump], new: list[Dump]) -> Verdict:
        sides = ([dump[metric] for dump in side] for side in (base, new))
        return judge(*sides, TOLERANCE, confidence, method.difference).verdict

    return decide


def by_check(base: list[Dump], new: list[Dump]) -> Verdict:
    """The verdict of `perf check` without options on dumps with a calibration."""
    found = [by_calibrated(adjusted, 0.99)(base, new)]
    for metric in ("total", "step"):
        if max(noise([dump[metric] for dump in side]) for side in (base, new)) <= QUIET:
            found.append(by_metric(metric, Method.DRIFTING, 0.99)(base, new))
    return max(found, key=list(Verdict).index)


def by_calibrated(adjust: Callable[..., Difference], confidence: float) -> Decide:
    def decide(base: list[Dump], new: list[Dump]) -> Verdict:
        speeds = [[math.log(dump[CALIBRATION]) for dump in side] for side in (base, new)]
        times = [[dump[CPU] for dump in side] for side in (base, new)]
        return judge(*times, TOLERANCE, confidence, lambda left, right: adjust(left, right, *speeds)).verdict

    return decide


def rated(draw: Draw, decide: Decide, trials: int) -> tuple[float, float, float]:
    """Shares of false alarms, of slowdowns that passed, and of slowdowns that were not found."""
    generator, alarms, passed, lost = random.Random(0), 0, 0, 0
    for _ in range(trials):
        base, new = draw(generator)
        alarms += decide(base, new) is Verdict.REGRESSION
        verdict = decide(base, [slower(dump) for dump in new])
        passed += verdict in (Verdict.PASS, Verdict.IMPROVEMENT)
        lost += verdict is not Verdict.REGRESSION
    return alarms / trials, passed / trials, lost / trials


def slower(dump: Dump) -> Dump:
    return {metric: value if metric == CALIBRATION else SLOWDOWN * value for metric, value in dump.items()}


def over_commits(dumps: list[Dump], metric: str, repeats: int, trials: int) -> tuple[float, float, float]:
    """Shares of steady histories with a change, and of slowdowns not found near and not found at their commit."""
    generator, alarms, far, lost = random.Random(0), 0, 0, 0
    for _ in range(trials):
        series = resample(dumps, COMMITS * repeats, generator)
        alarms += bool(changes(series, metric, repeats))
        at = generator.randrange(2, COMMITS - 1)
        changed = [slower(dump) if index >= at * repeats else dump for index, dump in enumerate(series)]
        found = [change.index for change in changes(changed, metric, repeats) if change.verdict is Verdict.REGRESSION]
        lost += at not in found
        far += not any(abs(index - at) <= 1 for index in found)
    return alarms / trials, far / trials, lost / trials


def changes(series: list[Dump], metric: str, repeats: int) -> list[Change]:
    """The changes of a history of commits with so many dumps; processor times with a calibration are adjusted."""
    logs = [math.log(dump[metric]) for dump in series]
    if metric == CPU and CALIBRATION in series[0]:
        logs = at_one_speed(logs, [math.log(dump[CALIBRATION]) for dump in series])
    means = [fmean(logs[at : at + repeats]) for at in range(0, len(logs), repeats)]
    return find([Place(math.exp(value), repeats) for value in means], Rule(lambda _: TOLERANCE))


Rates = Callable[[list[Dump], str, int], tuple[float, float, float]]
PAIRS = (10, 15, 20)
REPEATS = (1, 3, 5)  # dumps of each commit of a history
CHECKS = ((20, 5), (20, 10), (40, 10))  # dumps of the baseline, and new ones


def procedures() -> dict[str, Rates]:
    """Name -> rates of a recording by this procedure, judged by one metric, with so many trials."""

    def paired(count: int) -> Rates:
        return lambda dumps, metric, trials: rated(
            in_turn(dumps, count), by_metric(metric, Method.PAIRED, 0.95), trials
        )

    def check(base: int, new: int) -> Rates:
        return lambda dumps, metric, trials: rated(
            one_after_the_other(dumps, base, new), by_metric(metric, Method.DRIFTING, 0.99), trials
        )

    def history(repeats: int) -> Rates:
        return lambda dumps, metric, trials: over_commits(dumps, metric, repeats, trials)

    return {
        "compare, 20 dumps and then 20": lambda dumps, metric, trials: rated(
            one_after_the_other(dumps, 20, 20), by_metric(metric, Method.INDEPENDENT, 0.95), trials
        ),
        **{f"compare --paired, {count} pairs": paired(count) for count in PAIRS},
        **{f"check, {new} dumps against {base}": check(base, new) for base, new in CHECKS},
        **{f"history, {COMMITS} commits with {repeats} dumps": history(repeats) for repeats in REPEATS},
    }


def rates(recorded: dict[str, list[Dump]], trials: int) -> Iterator[str]:
    """Markdown: the rates of each procedure at the noise of the recording, without its calibration."""
    yield "| recording | metric | noise | procedure | false alarms | passed or far | not found |"
    yield "|---|---|---|---|---|---|---|"
    for name, calibrated_dumps in recorded.items():
        dumps = [{metric: dump[metric] for metric in (CPU, "total")} for dump in calibrated_dumps]
        for metric in (CPU, "total"):
            level = noise([dump[metric] for dump in dumps])
            for procedure, measure in procedures().items():
                yield f"| {name} | {metric} | {level:.1%} | {procedure} | {_shares(measure(dumps, metric, trials))} |"


def calibrated(recorded: dict[str, list[Dump]], trials: int) -> Iterator[str]:
    """Markdown: the rates of commands that use the calibration, within recordings that have one and between them."""
    yield "| baseline from | new dumps from | procedure | false alarms | passed or far | not found |"
    yield "|---|---|---|---|---|---|"
    known = {name: dumps for name, dumps in recorded.items() if CALIBRATION in dumps[0]}
    for (name, dumps), (other, later) in itertools.product(known.items(), repeat=2):
        for base, new in CHECKS:
            same = one_after_the_other(dumps, base, new)
            draw = same if name == other else at_another_time(dumps, later, base, new)
            cells = _shares(rated(draw, by_check, trials))
            yield f"| {name} | {other} | check, {new} dumps against {base} | {cells} |"
        for count in PAIRS if name == other else ():
            cells = _shares(rated(in_turn(dumps, count), by_calibrated(adjusted_pairs, 0.95), trials))
            yield f"| {name} | {other} | compare --paired --metric cpu, {count} pairs | {cells} |"
        for count in REPEATS if name == other else ():
            cells = _shares(over_commits(dumps, CPU, count, trials))
            yield f"| {name} | {other} | history --metric cpu, {COMMITS} commits with {count} dumps | {cells} |"


def _shares(found: tuple[float, float, float]) -> str:
    return " | ".join(f"{100 * share:.1f}%" for share in found)


def bounds(recorded: dict[str, list[Dump]], trials: int) -> Iterator[str]:
    """Markdown: the noise at which each procedure keeps both aims. The drift is that of the recording, made smaller."""
    yield "| recording | metric | procedure | noise of the dumps at most |"
    yield "|---|---|---|---|"
    for name, dumps in recorded.items():
        if CALIBRATION in dumps[0]:
            continue  # the commands adjust these
        for procedure, measure in procedures().items():
            kept = "none of these"
            for level in NOISE_LEVELS:
                values = scaled([dump[CPU] for dump in dumps], level)
                alarms, _, lost = measure([{CPU: value} for value in values], CPU, trials)
                if alarms <= MOST_ALARMS and lost <= MOST_LOST:
                    kept = f"{level:.1%}"
                    break
            yield f"| {name} | cpu | {procedure} | {kept} |"


def noise(values: Series) -> float:
    return stdev(map(math.log, values))


def scaled(values: Series, level: float) -> Series:
    """The same values around their mean, with this noise."""
    logs = [math.log(value) for value in values]
    middle, factor = fmean(logs), level / noise(values)
    return [math.exp(middle + factor * (log - middle)) for log in logs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="record NAME FOLDER")
    parser.add_argument("--trials", type=int, default=400)
    given = parser.parse_args()
    if given.words:
        _, name, folder = given.words
        record(name, folder)
        return
    recorded = recordings()
    parts = (calibrated, rates, bounds)
    for line in itertools.chain.from_iterable((*part(recorded, given.trials), "") for part in parts):
        print(line, flush=True)


if __name__ == "__main__":
    main()
