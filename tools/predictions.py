"""Compares predictions with measurements on this machine, as a table for docs/performance.md.

    python -m tools.predictions                               # measures the rates, then runs every case
    python -m tools.predictions --case landscape --layout single,tp2 --rounds 3
    python -m tools.predictions --keep-rates --folder DIR     # with the rates and models of an earlier call

Each run is a process of its own. The first run of a case is not counted, since `attention=auto` times kernels in it.
Other programs do not affect memory, but times: the last column is the processor time of rank 0 divided by the
prediction, which they affect less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sglang_gen import env
from sglang_gen.families import registry
from tools.bench import folders

RUNS = {
    name.removeprefix("midsize_"): run
    for spec in registry.specs()
    for name, run in registry.examples(spec).runs.items()
    if name.startswith("midsize_")
}
EMBEDDED = "landscape"
WORDS: dict[str, tuple[str, ...]] = {
    EMBEDDED: ("model=landscape", "--num-inference-steps", "28"),
    **{
        name: ("--num-inference-steps", str(run.steps), "--height", str(run.side), "--width", str(run.side))
        for name, run in RUNS.items()
    },
}
LAYOUTS = {"single": 1, "sp2": 2, "tp2": 2}


def model_of(case: str, folder: Path) -> list[str]:
    """The words that name a case's model, which is written to the folder unless it is there."""
    if case == EMBEDDED:
        return []
    return ["--model-path", str(folders.write(RUNS[case].preset, folder / case, "cpu", RUNS[case].changes))]


def run(words: Sequence[str], dump: Path) -> dict[str, Any]:
    """The perf dump of a run in a new process."""
    always = ("--prompt", "a lake", "--seed", "1", "--backend", "sglang", "--output-path", str(dump.parent / "images"))
    command = [sys.executable, "-m", "sglang_gen", "generate", *words, *always, "--perf-dump-path", str(dump)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env.rank_variables(threads=None))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
    content: dict[str, Any] = json.loads(dump.read_text())
    return content


def measure_rates(dtype: str, ranks: Sequence[int]) -> None:
    for count in sorted(set(ranks)):
        command = [sys.executable, "-m", "sglang_gen", "perf", "rates", "--dtype", dtype, "--ranks", str(count)]
        subprocess.run(command, check=True, stdout=sys.stderr, env=env.rank_variables(threads=None))


def rows(case: str, layout: str, dumps: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """One line of the table for each rank: medians over the dumps."""
    for rank in range(len(dumps[0]["ranks"])):
        found = [dump["ranks"][rank]["predicted"] for dump in dumps]
        first, base = found[0], found[0]["memory_mb"]["process"]
        memory = [one["memory_mb"]["measured"] for one in found]
        grown = median(memory) - base
        cpu = (
            [dump["cpu_duration_ms"] / dump["predicted"]["total_ms"]["predicted"] for dump in dumps] if not rank else []
        )
        yield [
            case,
            f"{layout}, rank {rank}" if LAYOUTS[layout] > 1 else layout,
            f"{first['memory_mb']['predicted']:.0f}",
            f"{median(memory):.0f}",
            f"{median(one['memory_mb']['ratio'] for one in found):.2f}",
            f"{grown / (first['memory_mb']['predicted'] - base):.2f}",
            f"{first['flops']['ratio']:.2f}",
            "" if first["communication_bytes"]["ratio"] is None else f"{first['communication_bytes']['ratio']:.2f}",
            *(f"{median(one['step_ms'][key] for one in found):.0f}" for key in ("predicted", "measured")),
            f"{median(one['step_ms']['ratio'] for one in found):.2f}",
            f"{median(one['total_ms']['ratio'] for one in found):.2f}",
            f"{median(cpu):.2f}" if cpu else "",
        ]


HEADER = ("model", "layout", "memory predicted, MiB", "measured", "ratio", "growth alone", "FLOPs", "communication",
          "step predicted, ms", "measured", "ratio", "whole", "processor")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default=",".join(WORDS))
    parser.add_argument("--layout", default=",".join(LAYOUTS))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep-rates", action="store_true")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    layouts = given.layout.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SGLANG_GEN_CACHE", str(folder / "cache"))
        if not given.keep_rates:
            measure_rates(given.dtype, [LAYOUTS[layout] for layout in layouts])
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
        for case in given.case.split(","):
            words = [*WORDS[case], *model_of(case, folder), "--dtype", given.dtype]
            for layout in layouts:
                dumps = [run([*words, f"parallel={layout}"], folder / "perf.json") for _ in range(1 + given.rounds)]
                for row in rows(case, layout, dumps[1:]):
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
