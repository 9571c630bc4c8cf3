"""Measures step caches on the embedded model: time, image quality and attributes.

    python -m tools.bench.step_caches --folder DIR                        # 28 steps, about 12 minutes on two cores
    python -m tools.bench.step_caches --folder DIR --steps 50
    python -m tools.bench.step_caches --folder DIR --manifest landscape16 --repeats 2 --cells none,scm_fast

The cells are presets, thresholds with and without TaylorSeer, and planned schedules, which are calibrated on prompts
that no manifest holds. A sweep over the manifest gives the images. Another, over 16 prompts with the repeats of all
cells in turn, gives the times: an image's denoising time is the least of its repeats, and the time ratio of a cell is
the sum of the exact run's times divided by the sum of its own. The 95 % interval comes from resampling the repeats.
The last line is the time of a reused step beside that of the blocks that it computes: the time of a computed step of
the same run less that of the other blocks, which `perf.blocks` measures.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml

from sglang_gen import env
from tools.landscape import manifest

CALIBRATION_PROMPTS = range(64, 80)  # the scenes after those of the manifests; half are for calibration
STDERR = 2  # file descriptor: standard output is for the table
SCM_STEPS = 28  # number of steps of the presets with a mask
CONF = Path(__file__).parents[2] / "conf" / "cache"
PRESETS = ("dbcache", "dbcache_taylorseer", "scm_slow", "scm_fast")
Dump = dict[str, Any]


def dbcache(threshold: float, calibrator: str | None = None) -> dict[str, Any]:
    """Settings of DBCache that can reuse from the third step on; the embedded model has 7 blocks."""
    return {
        "method": "dbcache",
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "residual_diff_threshold": threshold,
        "calibrator": calibrator,
    }


def cells(steps: int, plans: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Options of the group `cache` by name, the exact run first."""
    found: dict[str, dict[str, Any]] = {"none": {"method": "none"}}
    for preset in PRESETS:
        if steps == SCM_STEPS or not preset.startswith("scm"):
            settings = yaml.safe_load((CONF / f"{preset}.yaml").read_text(encoding="utf-8"))
            found[preset] = {**settings, "Fn_compute_blocks": 1}
    found |= {f"threshold_{value}": dbcache(value) for value in (0.12, 0.2, 0.3, 0.5)}
    found |= {f"taylorseer_{value}": dbcache(value, "taylorseer") for value in (0.2, 0.3, 0.5)}
    return found | {name: {"method": "planned", "plan_file": str(path.resolve())} for name, path in plans.items()}


def sglang(*words: str) -> None:
    command = [sys.executable, "-m", "sglang_gen", *words]
    done = subprocess.run(command, check=False, stdout=STDERR, env=env.rank_variables(threads=None))
    if done.returncode:
        raise SystemExit(f"sglang {' '.join(words)}: exit code {done.returncode}")


def make_plans(folder: Path, given: argparse.Namespace) -> dict[str, Path]:
    """The files of the planned schedules by the name of their cell."""
    prompts = folder / "calibration.jsonl"
    prompts.write_text("\n".join(manifest.lines(CALIBRATION_PROMPTS.stop)[CALIBRATION_PROMPTS.start :]) + "\n")
    plans = {}
    for budget in given.budgets.split(","):
        path = plans[f"planned_{budget}"] = folder / f"planned_{given.steps}_{budget}.json"
        if not path.exists():
            sglang("tune", "cache", "--budget", budget, f"quality.manifest={prompts}", "--calibration-prompts", "8",
                   *settings(given), "--output", str(path))  # fmt: skip
    return plans


def settings(given: argparse.Namespace) -> tuple[str, ...]:
    return ("--num-inference-steps", str(given.steps), "--dtype", given.dtype, "--backend", "sglang")


def image_times(dump: Dump) -> np.ndarray:
    """Denoising milliseconds of each repeat and image (repeats x images, batches of one image)."""
    rows = []
    for repeat in dump["repeats"]:
        times: dict[int, float] = defaultdict(float)
        for step in repeat["denoise_steps_ms"]:
            times[step["batch"]] += step["duration_ms"]
        rows.append([times[batch] for batch in sorted(times)])
    return np.array(rows)


def ratio(exact: np.ndarray, cell: np.ndarray) -> tuple[float, float, float]:
    """Time of the exact run / time of the cell, and the bounds of its 95 % interval: a bootstrap over the repeats."""

    def of(draw: np.ndarray) -> float:
        return float(exact[draw].min(axis=0).sum() / cell[draw].min(axis=0).sum())

    repeats = np.arange(len(exact))
    rng = np.random.default_rng(0)
    low, high = np.percentile([of(rng.choice(repeats, len(repeats))) for _ in range(2000)], (2.5, 97.5))
    return of(repeats), float(low), float(high)


def row(name: str, dump: Dump, blocks: float, times: tuple[float, float, float]) -> list[str]:
    quality, attributes = dump["quality"], dump["quality"]["summary"]["attribute_accuracy"]
    psnr, ssim = quality["summary"]["psnr"], quality["summary"]["ssim"]
    if psnr["mean"] is None:
        psnr_words = ["identical", "identical"]
    else:
        psnr_words = [f"{psnr['worst']['value']:.1f}", f"{psnr['mean']:.1f}"]
    value, low, high = times
    return [
        name,
        f"{blocks:.2f}",
        f"{value:.2f} ({low:.2f} to {high:.2f})",
        *psnr_words,
        f"{ssim['worst']['value']:.3f}",
        f"{ssim['mean']:.3f}",
        f"{100 * attributes['mean']:.1f}",
        f"{100 * attributes['difference']:+.1f} ± {100 * attributes['difference_error']:.1f}",
    ]


HEADER = ("cache", "blocks", "time ratio", "worst PSNR", "mean PSNR", "worst SSIM", "mean SSIM",
          "attributes, %", "difference to exact")  # fmt: skip


def part_of_the_blocks(exact: Dump, dump: Dump) -> float:
    """The part of the FLOPs of the exact run's denoising that was done: nearly all of them are the blocks'."""
    return float(dump["work"]["denoising"]["flops"] / exact["work"]["denoising"]["flops"])


def reused_step(folder: Path, given: argparse.Namespace) -> str:
    """The time of a reused step of scm_fast beside that of the blocks that it computes, in one process."""
    dump = folder / "step" / "perf.json"
    words = ["quality=landscape16", "quality.reference=null", "cache=scm_fast", "cache.Fn_compute_blocks=1"]
    words += ["--num-inference-steps", str(SCM_STEPS), "--dtype", given.dtype, "--backend", "sglang"]
    words += ["perf.blocks=true", "--output-path", str(dump.parent), "--perf-dump-path", str(dump)]
    sglang("generate", *words)
    measured = json.loads(dump.read_text())
    kinds = measured["cache"]["steps"]
    times: dict[str, list[float]] = {"compute": [], "reuse": []}
    for step in measured["repeats"][0]["denoise_steps_ms"]:
        times[kinds[step["step"]]].append(step["duration_ms"])
    left_out = sum(block["mean_ms"] for block in measured["block_timings_ms"][1:])
    computed, reused = mean(times["compute"]), mean(times["reuse"])
    return (
        f"A reused step takes {reused:.2f} ms, {reused / (computed - left_out):.2f} times a computed step "
        f"({computed:.2f} ms) less the blocks that are left out ({left_out:.2f} ms)."
    )


def sweep(target: Path, names: Sequence[str], words: Sequence[str], conf: Path) -> dict[str, Dump]:
    """The perf dump of each cell of a sweep over options of the group `cache`."""
    cells = ",".join(f"cell_{name}" for name in names)
    sglang("generate", "--config-dir", str(conf), f"cache={cells}", *words, "--output-path", str(target), "-m")
    return {name: json.loads((target / str(index) / "perf.json").read_text()) for index, name in enumerate(names)}


def write_options(conf: Path, options: Mapping[str, Mapping[str, Any]]) -> None:
    (conf / "cache").mkdir(parents=True, exist_ok=True)
    for name, option in options.items():
        (conf / "cache" / f"cell_{name}.yaml").write_text(yaml.safe_dump(dict(option)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for schedules, images and dumps")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--manifest", default="landscape64", choices=("landscape16", "landscape64"))
    parser.add_argument("--repeats", type=int, default=6, help="repeats of 16 prompts for the times, at least 2")
    parser.add_argument("--budgets", default="0.33,0.4,0.5,0.7", help="parts of the blocks that the schedules compute")
    parser.add_argument("--cells", help="names of the cells, none first; default all")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    options = cells(given.steps, make_plans(given.folder, given) if given.budgets else {})
    if given.cells:
        options = {name: options[name] for name in given.cells.split(",")}
    conf = given.folder / "conf"
    write_options(conf, options)
    common = settings(given)
    images = sweep(given.folder / f"images_{given.steps}", list(options), (*common, f"quality={given.manifest}"), conf)
    repeated = ("quality=landscape16", f"perf.repeat={given.repeats}", "perf.interleave=true", "perf=light")
    times = sweep(given.folder / f"times_{given.steps}", list(options), (*common, *repeated), conf)
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for name, dump in images.items():
        compared = ratio(image_times(times["none"]), image_times(times[name]))
        print(f"| {' | '.join(row(name, dump, part_of_the_blocks(images['none'], dump), compared))} |")
    print(f"\n{reused_step(given.folder, given)}")


if __name__ == "__main__":
    main()
