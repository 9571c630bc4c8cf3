"""What `sglang tune cache` prints and writes: the table of trials, the cache plan and the command that uses it."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from sglang_gen import env
from sglang_gen.plan.cache_plan import FORMAT, PLAN_VERSION
from sglang_gen.tune.plan_bench import SPAN, PlanBench
from sglang_gen.tune.plan_options import PlanOptions
from sglang_gen.tune.plan_search import PlanSearch, PlanTrial
from sglang_gen.tune.prompt_split import PromptSplit
from sglang_gen.types import Plan, Sample


def table(search: PlanSearch, chosen: PlanTrial | None) -> list[str]:
    """The trials, fewest blocks first; the chosen one is marked."""
    names = ("blocks", 12), ("of all", 7), ("computed", 8), ("expected error", 14), ("worst dB", 9), ("mean dB", 8)
    lines = [" ".join(f"{name:>{width}}" for name, width in (*names, ("time", 6)))]
    for trial in sorted(search.trials, key=lambda trial: trial.schedule.blocks):
        schedule, measured, most = trial.schedule, trial.measured, search.planner.most
        full = sum(depth is None for depth in schedule.depths)
        lines.append(
            f"{f'{schedule.blocks}/{most}':>12} {schedule.blocks / most:>7.1%} {full:>8} {schedule.error:>14.3g} "
            f"{measured.worst:>9.2f} {measured.mean:>8.2f} {measured.time:>6.2f}{' *' if trial is chosen else ''}"
        )
    return lines


def steps_line(chosen: PlanTrial) -> str:
    """The schedule: C for a step that is computed, the depth of one that is reused."""
    return "Schedule: " + " ".join("C" if depth is None else str(depth) for depth in chosen.schedule.depths)


def content(bench: PlanBench, split: PromptSplit, options: PlanOptions, chosen: PlanTrial) -> dict[str, Any]:
    """The cache plan as JSON."""
    schedule, measured = chosen.schedule, chosen.measured
    return {
        "format": FORMAT,
        "schema_version": PLAN_VERSION,
        "model": bench.plan.card.name,
        "bound_to": bench.bound_to,
        "blocks": bench.blocks,
        "depths": list(schedule.depths),
        "computed_blocks": schedule.blocks,
        "expected_error": schedule.error,
        "calibration": _about(split.calibrated) | {"depths": list(bench.depths), "span": SPAN},
        "measured": _about(split.measured)
        | {
            "min_psnr": options.min_psnr,
            "worst_psnr": _decibels(measured.worst),
            "mean_psnr": _decibels(measured.mean),
            "worst_prompt": measured.worst_prompt,
            "time": round(measured.time, 4),
        },
        "commit_hash": env.commit_hash(),
        "versions": dict(env.versions()),
    }


def _about(samples: Sequence[Sample]) -> dict[str, Any]:
    """The number of samples and a digest of their prompts and seeds."""
    named = [[sample.prompt, sample.negative_prompt, sample.seed] for sample in samples]
    return {"images": len(samples), "digest": hashlib.sha256(json.dumps(named).encode()).hexdigest()}


def _decibels(value: float) -> float | None:
    """A PSNR as JSON holds it; None if all images are identical."""
    return None if math.isinf(value) else round(value, 4)


def use(plan: Plan, options: PlanOptions, words: Sequence[str], sample: Sample) -> list[str]:
    """The command that generates with the plan, for one of the measured prompts."""
    dtype = [] if plan.run.dtype.name != "auto" else [f"dtype={plan.dtype}"]
    return ["sglang", "generate", *words, *dtype, "cache=planned", f"cache.plan_file={options.output}",
            "--prompt", sample.prompt, "--seed", str(sample.seed)]  # fmt: skip
