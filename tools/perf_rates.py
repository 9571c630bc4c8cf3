"""False alarm and miss rates of `sglang perf`, by bootstrapping recorded runs of one machine.

    python -m tools.perf_rates                              # the rates, from tools/perf_rates.json
    python -m tools.perf_rates record NAME FOLDER           # add the dumps of a folder to that file as a recording

Dumps are drawn in blocks of neighbors (D. N. Politis and J. P. Romano, "The stationary bootstrap", JASA 89, 1994; mean
length 5), so the drift of the machine stays in the samples. A false alarm is a REGRESSION, or a change of a history, of
an unchanged program. For the misses the new dumps are made slower by 10 %: `passed` are those that were called PASS or
IMPROVEMENT, and `not found` includes those that were TOO_NOISY; of a history, those whose change was not found at its
commit, `near` at a neighbor either.
"""

import argparse
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev

from sglang_gen.perf.change_points import Place, Rule, find
from sglang_gen.perf.compare import TOLERANCES
from sglang_gen.perf.dump_reader import collect
from sglang_gen.perf.log_ratio import Method
from sglang_gen.perf.statistics import Verdict, judge

FILE = Path(__file__).with_suffix(".json")
METRICS = ("total", "step", "cpu")
SLOWDOWN = 1.1
BLOCK = 5  # mean length of a block of dumps
COMMITS = 30
NOISE_LEVELS = (0.08, 0.06, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.0075, 0.005)
MOST_ALARMS, MOST_LOST = 0.01, 0.05
Series = list[float]


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
            {metric: [round(value, 1) for value in dump.metrics[metric]] for metric in METRICS} for dump in dumps
        ],
    }
    lines = [json.dumps(value, separators=(",", ":")).replace('{"total"', '\n{"total"') for value in content.values()]
    text = ",\n".join(f"{json.dumps(key)}: {line}" for key, line in zip(content, lines, strict=True))
    FILE.write_text(f"{{{text}}}\n", encoding="utf-8")


def recordings(path: Path = FILE) -> dict[str, dict[str, Series]]:
    """Recording -> metric -> the observation of each dump, the geometric mean of its repeats."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: {
            metric: [math.exp(fmean(map(math.log, dump[metric]))) for dump in recorded["dumps"]] for metric in METRICS
        }
        for name, recorded in content.items()
    }


def resample(values: Series, count: int, generator: random.Random) -> Series:
    """A stationary bootstrap: runs of neighbors, around the end to the start, each with a random start and length."""
    found, at = Series(), generator.randrange(len(values))
    while len(found) < count:
        found.append(values[at])
        at = generator.randrange(len(values)) if generator.random() < 1 / BLOCK else (at + 1) % len(values)
    return found


Split = Callable[[Series], tuple[Series, Series]]


def in_turn(series: Series) -> tuple[Series, Series]:
    return series[::2], series[1::2]


def compared(
    values: Series, split: tuple[int, Split], method: Method, confidence: float, trials: int
) -> tuple[float, float, float]:
    """Shares of false alarms, of slowdowns that passed, and of slowdowns that were not found."""
    generator, alarms, passed, lost = random.Random(0), 0, 0, 0
    count, sides = split
    tolerance = TOLERANCES["total"].relative
    for _ in range(trials):
        base, new = sides(resample(values, count, generator))
        alarms += judge(base, new, tolerance, confidence, method.difference).verdict is Verdict.REGRESSION
        slower = [SLOWDOWN * value for value in new]
        verdict = judge(base, slower, tolerance, confidence, method.difference).verdict
        passed += verdict in (Verdict.PASS, Verdict.IMPROVEMENT)
        lost += verdict is not Verdict.REGRESSION
    return alarms / trials, passed / trials, lost / trials


def over_commits(values: Series, repeats: int, trials: int) -> tuple[float, float, float]:
    """Shares of steady histories with a change, and of slowdowns not found near and not found at their commit."""
    generator, alarms, far, lost = random.Random(0), 0, 0, 0
    rule = Rule(lambda _: TOLERANCES["total"].relative)
    for _ in range(trials):
        series = resample(values, COMMITS * repeats, generator)
        logs = [fmean(map(math.log, series[at : at + repeats])) for at in range(0, len(series), repeats)]
        alarms += bool(find([Place(math.exp(value), repeats) for value in logs], rule))
        at = generator.randrange(2, COMMITS - 1)
        slower = [
            Place((SLOWDOWN if index >= at else 1) * math.exp(value), repeats) for index, value in enumerate(logs)
        ]
        found = [change.index for change in find(slower, rule) if change.verdict is Verdict.REGRESSION]
        lost += at not in found
        far += not any(abs(index - at) <= 1 for index in found)
    return alarms / trials, far / trials, lost / trials


def procedures() -> dict[str, Callable[[Series, int], tuple[float, float, float]]]:
    """Name -> rates of a recording by this procedure, with so many trials."""

    def split(base: int) -> Split:
        return lambda series: (series[:base], series[base:])

    def pairs(count: int) -> Callable[[Series, int], tuple[float, float, float]]:
        return lambda values, trials: compared(values, (2 * count, in_turn), Method.PAIRED, 0.95, trials)

    def check(base: int, new: int) -> Callable[[Series, int], tuple[float, float, float]]:
        return lambda values, trials: compared(values, (base + new, split(base)), Method.DRIFTING, 0.99, trials)

    def history(repeats: int) -> Callable[[Series, int], tuple[float, float, float]]:
        return lambda values, trials: over_commits(values, repeats, trials)

    return {
        "compare, 20 dumps and then 20": lambda values, trials: compared(
            values, (40, split(20)), Method.INDEPENDENT, 0.95, trials
        ),
        **{f"compare --paired, {count} pairs": pairs(count) for count in (10, 15, 20, 25)},
        **{f"check, {new} dumps against {base}": check(base, new) for base, new in ((20, 5), (40, 10))},
        **{f"history, {COMMITS} commits with {repeats} dumps": history(repeats) for repeats in (1, 3, 5)},
    }


def rates(recorded: dict[str, dict[str, Series]], trials: int) -> Iterator[str]:
    """Markdown: the rates of each procedure at the noise of the recording."""
    yield "| recording | metric | noise | procedure | false alarms | passed or far | not found |"
    yield "|---|---|---|---|---|---|---|"
    for name, metrics in recorded.items():
        for metric in ("cpu", "total"):
            for procedure, measure in procedures().items():
                cells = [f"{100 * share:.1f}%" for share in measure(metrics[metric], trials)]
                yield f"| {name} | {metric} | {noise(metrics[metric]):.1%} | {procedure} | {' | '.join(cells)} |"


def bounds(recorded: dict[str, dict[str, Series]], trials: int) -> Iterator[str]:
    """Markdown: the noise at which each procedure keeps both aims. The drift is that of the recording, made smaller."""
    yield "| recording | metric | procedure | noise of the dumps at most |"
    yield "|---|---|---|---|"
    for name, metrics in recorded.items():
        for procedure, measure in procedures().items():
            kept = "none of these"
            for level in NOISE_LEVELS:
                alarms, _, lost = measure(scaled(metrics["cpu"], level), trials)
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
    parser.add_argument("--trials", type=int, default=1000)
    given = parser.parse_args()
    if given.words:
        _, name, folder = given.words
        record(name, folder)
        return
    recorded = recordings()
    for line in itertools.chain(rates(recorded, given.trials), [""], bounds(recorded, given.trials)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
