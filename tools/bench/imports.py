"""Seconds of imports by package, from a cold process to the first image, beside diffusers.

    python -m tools.bench.imports --rounds 3

Sums the time of each module's own code (`python -X importtime`) by top-level package. The bookkeeping makes
imports slower than without it, so the numbers show proportions; `python -m tools.bench.start` measures the total.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence

from sglang_gen import env
from tools.bench.start import OURS, THEIRS

LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", re.MULTILINE)


def by_package(log: str) -> Counter[str]:
    """Seconds by top-level package, from what `python -X importtime` prints; the standard library is one package."""
    seconds: Counter[str] = Counter()
    for microseconds, module in LINE.findall(log):
        package = module.partition(".")[0]
        seconds["standard library" if package in sys.stdlib_module_names else package] += int(microseconds) / 1e6
    return seconds


def once(code: str, folder: str) -> Counter[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        cwd=folder, env=env.rank_variables(threads=1), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return by_package(done.stderr)


def table(runs: dict[str, Sequence[Counter[str]]], least: float = 0.05) -> str:
    """Markdown with the median of each package; those below `least` seconds everywhere are summed."""
    medians = {
        name: {package: statistics.median(run[package] for run in results) for package in set().union(*results)}
        for name, results in runs.items()
    }
    packages = sorted(set().union(*medians.values()), key=lambda package: -max(_of(medians, package)))
    shown = [package for package in packages if max(_of(medians, package)) >= least]
    rows = [(package, _of(medians, package)) for package in shown]
    left = [sum(each[package] for package in each if package not in shown) for each in medians.values()]
    rows += [(f"{len(packages) - len(shown)} others", left)] if len(packages) > len(shown) else []
    rows += [("all", [sum(each.values()) for each in medians.values()])]
    lines = [f"| seconds | {' | '.join(runs)} |", f"|---|{'---|' * len(runs)}"]
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" for name, values in rows)]
    )


def _of(medians: dict[str, dict[str, float]], package: str) -> list[float]:
    return [each.get(package, 0.0) for each in medians.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    runs: dict[str, list[Counter[str]]] = {"sglang-gen": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, code in (("sglang-gen", OURS), ("diffusers", THEIRS)):
                runs[name].append(once(code, folder))
    print(table(dict(runs)))


if __name__ == "__main__":
    main()
