"""The command `sglang tune cache`: calibrates the schedule of a planned step cache and writes its cache plan."""

import argparse
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sglang_gen import env, files, log
from sglang_gen.config.schema import BackendName, leaves, user_gave
from sglang_gen.errors import RunError, UserError
from sglang_gen.tune.plan_options import DEFAULT_CALIBRATION, PlanOptions, read_plan_options

if TYPE_CHECKING:
    from sglang_gen.config.choices import Choices
    from sglang_gen.config.compose import Composed
    from sglang_gen.tune.plan_bench import PlanBench
    from sglang_gen.tune.plan_search import PlanSearch, PlanTrial
    from sglang_gen.types import Plan, Sample

# Settings without effect here: nothing is saved but the plan.
IDLE_SETTINGS = ("output.", "perf.", "quality.reference", "quality.metrics", "tracking.", "machine.", "compile.warmup")
# Settings of prompts and of what is saved, which the printed command leaves out.
LEFT_OUT = ("sampling.prompt", "sampling.num_samples", "sampling.seed", "quality.", "output.", "perf.", "tracking")


@dataclass(frozen=True)
class PromptSplit:
    """Samples for calibration and for measuring, which have no prompt in common."""

    calibrated: tuple["Sample", ...]
    measured: tuple["Sample", ...]


def tune_cache(choices: "Choices", given: Mapping[str, Any], words: Sequence[str]) -> int:
    """Carry out `sglang tune cache`; `words` are the flags and overrides of the request, for the command that is
    printed. Returns the exit code. Raises UserError, and RunError if no schedule keeps the bound."""
    options = read_plan_options(given)
    composed = _composed(choices)
    log.setup(composed.run.log_level.name)
    for notice in composed.notices:
        log.info(notice)
    env.prepare_libraries()
    plan = _planned(composed)
    split = split_samples([sample for batch in plan.batches for sample in batch], options.calibration_prompts)
    files.prepare_file(options.output)
    from sglang_gen.launch import numerics

    with numerics.settled(plan.dtype, plan.run.deterministic):
        return _tuned(plan, split, options, words)


def _composed(choices: "Choices") -> "Composed":
    """The composed run, with a manifest of the package for the embedded model if no prompt is given."""
    from sglang_gen.config import manifest
    from sglang_gen.config.compose import compose, compose_partly
    from sglang_gen.config.hydra_loader import open_loader

    partly, _ = compose_partly(choices, open_loader(choices.config_dir))
    sampling, model = partly.run.sampling, partly.run.model
    stated = sampling.prompt is not None or sampling.prompts or sampling.prompts_file or partly.run.quality.manifest
    own = [name for name in manifest.shipped() if model.path is None and name.startswith(model.preset or "\0")]
    if own and not stated:
        choices = replace(choices, overrides=(*choices.overrides, f"quality.manifest={own[0]}"))
    return compose(choices)


def _planned(composed: "Composed") -> "Plan":
    """The plan of the exact run on the native engine, with local weights. Raises UserError."""
    from sglang_gen.backends.native import planned_request
    from sglang_gen.hub import resolve
    from sglang_gen.plan import checks, make, step_cache, stored_dtype

    run = composed.run
    if step_cache.wanted(run.cache) or run.cache.plan_file:
        raise UserError("sglang tune cache calibrates a schedule from the exact run; leave out the settings of cache")
    if run.dry_run:
        raise UserError("sglang tune cache has no dry run; leave out dry_run")
    seed = 0 if run.sampling.seed is None else run.sampling.seed
    quality = replace(run.quality, reference=None, metrics=[])
    run = replace(
        run,
        backend=replace(run.backend, name=BackendName.sglang),
        sampling=replace(run.sampling, seed=seed),
        quality=quality,
        perf=replace(run.perf, blocks=False, repeat=1, trace=False),
    )
    composed = replace(composed, run=run)
    checks.check_request(composed)
    plan = make.make_plan(composed, resolve.find(run.model, weights=False))
    if plan.layout.ranks > 1:
        raise UserError(
            "sglang tune cache calibrates on one rank, and the schedule holds for every layout; leave out the settings "
            "of parallel"
        )
    planned_request.check_transformer(plan)
    planned_request.refuse_whole(plan)
    for warning in plan.warnings:
        if not warning.startswith(IDLE_SETTINGS):
            log.warning(warning)
    for path in leaves():
        if path.startswith(IDLE_SETTINGS) and user_gave(composed.run, composed.sources, path):
            log.warning(f"{path} has no effect on sglang tune cache")
    return stored_dtype.require(make.complete(composed, plan, resolve.find_weights(plan.run)))


def split_samples(samples: Sequence["Sample"], count: int | None) -> PromptSplit:
    """Samples of `count` prompts, evenly spaced, are for calibration, those of all other prompts for measuring.

    Raises UserError if no prompt is left for one of both.
    """
    texts = list(dict.fromkeys(sample.prompt for sample in samples))
    if len(texts) < 2:
        raise UserError(
            "sglang tune cache measures on other prompts than it calibrates on, and needs at least two: give "
            "sampling.prompts_file or quality.manifest"
        )
    if count is not None and count >= len(texts):
        raise UserError(
            f"--calibration-prompts is {count}, and the request has {len(texts)} prompts, of which at least one is "
            f"measured; give at most {len(texts) - 1}"
        )
    count = count or min(DEFAULT_CALIBRATION, len(texts) // 2)
    chosen = {texts[place * len(texts) // count] for place in range(count)}
    return PromptSplit(
        tuple(sample for sample in samples if sample.prompt in chosen),
        tuple(sample for sample in samples if sample.prompt not in chosen),
    )


def _tuned(plan: "Plan", split: PromptSplit, options: PlanOptions, words: Sequence[str]) -> int:
    from sglang_gen.tune.plan_bench import PlanBench
    from sglang_gen.tune.plan_schedule import Planner
    from sglang_gen.tune.plan_search import PlanSearch

    log.info(f"Loading model: {plan.card.name}")
    bench = PlanBench(plan)
    bench.warm_up(split.calibrated[0])
    log.info(f"Calibrating on {len(split.calibrated)} images: {_indices(split.calibrated)}")
    planner = Planner(bench.calibrate(split.calibrated), bench.steps, bench.blocks)
    log.info(f"Measuring on {len(split.measured)} other images: {_indices(split.measured)}")
    batches = bench.batches(split.measured)
    exact = bench.exact(batches)
    search = PlanSearch(planner, lambda schedule: bench.measure(schedule, batches, exact))
    if options.budget is not None:
        blocks = int(options.budget * planner.most)
        if blocks < planner.least:
            raise UserError(
                f"--budget is {options.budget:g} of {planner.most} blocks, and the smallest schedule computes "
                f"{planner.least}; give at least {math.ceil(1000 * planner.least / planner.most) / 1000:g}"
            )
        chosen: PlanTrial | None = search.try_budget(blocks)
    else:
        assert options.min_psnr is not None
        chosen = search.bisect(options.min_psnr)
    return _concluded(plan, split, options, search, chosen, bench, words)


def _concluded(
    plan: "Plan",
    split: PromptSplit,
    options: PlanOptions,
    search: "PlanSearch",
    chosen: "PlanTrial | None",
    bench: "PlanBench",
    words: Sequence[str],
) -> int:
    """Print the trials and write the plan. Raises RunError if no schedule keeps the bound."""
    lines = table(search, chosen)
    if chosen is None:
        files.print_result("\n".join(lines))
        raise RunError(
            f"No schedule keeps {options.min_psnr:g} dB for every image with fewer blocks than the exact run; lower "
            "--min-psnr"
        )
    files.save_json(options.output, content(plan, split, options, chosen, bench))
    log.info(f"Cache plan saved to: {options.output}")
    command = shlex.join(use(plan, options, words, split.measured[0]))
    files.print_result("\n".join([*lines, "", steps_line(chosen), f"Use it: {command}"]))
    return 0


def table(search: "PlanSearch", chosen: "PlanTrial | None") -> list[str]:
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


def steps_line(chosen: "PlanTrial") -> str:
    """The schedule: C for a step that is computed, the depth of one that is reused."""
    return "Schedule: " + " ".join("C" if depth is None else str(depth) for depth in chosen.schedule.depths)


def content(
    plan: "Plan", split: PromptSplit, options: PlanOptions, chosen: "PlanTrial", bench: "PlanBench"
) -> dict[str, Any]:
    """The cache plan as JSON."""
    from sglang_gen.plan.cache_plan import FORMAT, PLAN_VERSION
    from sglang_gen.tune.plan_bench import SPAN

    schedule, measured = chosen.schedule, chosen.measured
    return {
        "format": FORMAT,
        "schema_version": PLAN_VERSION,
        "model": plan.card.name,
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
            "denoising_time": round(measured.time, 4),
        },
        "commit_hash": env.commit_hash(),
        "versions": dict(env.versions()),
    }


def _about(samples: Sequence["Sample"]) -> dict[str, Any]:
    """The number of samples and a digest of their prompts and seeds."""
    named = [[sample.prompt, sample.negative_prompt, sample.seed] for sample in samples]
    return {"images": len(samples), "digest": hashlib.sha256(json.dumps(named).encode()).hexdigest()}


def _decibels(value: float) -> float | None:
    """A PSNR as JSON holds it; None if all images are identical."""
    return None if math.isinf(value) else round(value, 4)


def _indices(samples: Sequence["Sample"]) -> str:
    return ", ".join(str(sample.index) for sample in samples)


def kept_words(parser: argparse.ArgumentParser, options: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The options and overrides of the request that the printed command repeats: all but prompts and this command's."""
    actions = parser._option_string_actions
    others = [word for word in options if not actions[word.partition("=")[0]].dest.startswith(("plan.", *LEFT_OUT))]
    return [*others, *(word for word in overrides if not word.lstrip("+").startswith(LEFT_OUT))]


def use(plan: "Plan", options: PlanOptions, words: Sequence[str], sample: "Sample") -> list[str]:
    """The command that generates with the plan, for one of the measured prompts."""
    dtype = [] if plan.run.dtype.name != "auto" else [f"dtype={plan.dtype}"]
    return ["sglang", "generate", *words, *dtype, "cache=planned", f"cache.plan_file={options.output}",
            "--prompt", sample.prompt, "--seed", str(sample.seed)]  # fmt: skip
