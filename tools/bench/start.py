"""Benchmarks the time from a cold process to the first image of the embedded model, against diffusers.

    python -m tools.bench.start --rounds 7

Both generate and save an image with the same prompt, seed, dtype, steps and guidance, in turn. CPU seconds (user and
system) of one thread are reported instead of wall-clock time, since other processes share the processors. Our `import`
includes composing the configuration and making the plan. The total also includes the end of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from sglang_gen import env
from sglang_gen.perf import cpu_dtype
from sglang_gen.perf.statistics import judge

PROMPT, STEPS, GUIDANCE, TOKENS = "A serene landscape with mountains and a lake at sunset", 28, 4.0, 32
PIPELINE = json.loads((env.embedded_model() / "model_index.json").read_text())["_class_name"]
DTYPE = cpu_dtype.choose(native=True).dtype

OURS = f"""
import json, sys, time
from sglang_gen import cli
from sglang_gen.backends.native import engine as native
marks, load = [], native.load
def noted(*args):
    marks.append(time.process_time())
    engine = load(*args)
    marks.append(time.process_time())
    return engine
native.load = noted
sys.argv = ["sglang", "generate", "--prompt", {PROMPT!r}, "--seed", "42", "--dtype", "{DTYPE}", "--backend", "sglang"]
try:
    cli.console()
finally:
    print(json.dumps([*marks, time.process_time()]))
"""
THEIRS = f"""
import json, sys, time
import torch
from diffusers import {PIPELINE}
marks = [time.process_time()]
pipeline = {PIPELINE}.from_pretrained({str(env.embedded_model())!r}, torch_dtype=torch.{DTYPE})
marks.append(time.process_time())
image = pipeline({PROMPT!r}, num_inference_steps={STEPS}, guidance_scale={GUIDANCE}, max_sequence_length={TOKENS},
                 generator=torch.Generator("cpu").manual_seed(42)).images[0]
image.save("image.png")
print(json.dumps([*marks, time.process_time()]))
"""
PHASES = ("import", "load", "run", "total")


def once(code: str, folder: Path) -> dict[str, float]:
    """CPU seconds of the phases of one process, and in total."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=env.rank_variables(threads=1),
        capture_output=True,
        text=True,
        check=True,
    )
    after = os.times()
    marks = [0.0, *json.loads(done.stdout.splitlines()[-1])]
    phases = [later - earlier for earlier, later in pairwise(marks)]
    total = after.children_user + after.children_system - before.children_user - before.children_system
    return dict(zip(PHASES, [*phases, total], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    runs: dict[str, list[dict[str, float]]] = {"sglang-gen": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, rounds):  # the first round fills the file caches and is not counted
            turn = [("sglang-gen", OURS), ("diffusers", THEIRS)]
            for name, code in turn if number % 2 else reversed(turn):
                seconds = once(code, Path(folder))
                if number >= 0:
                    runs[name].append(seconds)
    print(f"| CPU seconds, {DTYPE}, median of {rounds} | {' | '.join(PHASES)} |\n|---|{'---|' * len(PHASES)}")
    for name, results in runs.items():
        medians = [f"{statistics.median(run[phase] for run in results):.2f}" for phase in PHASES]
        print(f"| {name} | {' | '.join(medians)} |")
    verdict = judge(*([run["total"] for run in runs[name]] for name in ("diffusers", "sglang-gen")), tolerance=0.02)
    low, high = verdict.interval or (verdict.ratio, verdict.ratio)
    print(f"\nTotal, ours / diffusers: {verdict.ratio:.2f} ({low:.2f} to {high:.2f}, 95 %).")


if __name__ == "__main__":
    main()
