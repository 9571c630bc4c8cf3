"""The command `sglang tune cache`: calibrates the schedule of a planned step cache and writes its cache plan."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang_gen import env, files, log
from sglang_gen.config.schema import BackendName
from sglang_gen.errors import RunError, UserError
from sglang_gen.tune.plan_options import PlanOptions, read_plan_options
from sglang_gen.tune.prompt_split import PromptSplit, indices, split_samples

if TYPE_CHECKING:
    from sglang_gen.config.choices import Choices
    from sglang_gen.config.compose import Composed
    from sglang_gen.tune.plan_bench import PlanBench
    from sglang_gen.tune.plan_search import PlanSearch, PlanTrial
    from sglang_gen.types import Plan

# Settings without effect here: nothing is saved but the plan.
IDLE_SETTINGS = ("output.", "perf.", "quality.reference", "quality.metrics", "tracking.", "machine.", "compile.warmup")


def tune_cache(choices: "Choices", given: Mapping[str, Any], words: Sequence[str]) -> int:
    """Carry out `sglang tune cache`; returns the exit code.

    `words` are the flags and overrides of the request that the printed command repeats. Raises UserError, and RunError
    if no schedule keeps the bound.
    """
    options = read_plan_options(given)
    composed = _composed(choices)
    log.setup(composed.run.log_level.name)
    log.ask_first(lambda _, line: not line.startswith("Progress: "))  # of each of many generations
    for notice in composed.notices:
        log.info(notice)
    env.prepare_libraries()
    plan = _planned(composed, options)
    from sglang_gen.launch import numerics
    from sglang_gen.tune.plan_bench import PlanBench

    samples = [sample for batch in plan.batches for sample in batch]
    split = split_samples(samples, options.calibration_prompts)
    files.prepare_file(options.output)
    with numerics.settled(plan.dtype, plan.run.deterministic):
        log.info(f"Loading model: {plan.card.name}")
        bench = PlanBench(plan)
        search = _search(bench, split)
        found = _found(search, options)
    return _concluded(bench, split, options, search, found, words)


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


def _planned(composed: "Composed", options: PlanOptions) -> "Plan":
    """The plan of the exact run on the native engine, with local weights. Raises UserError."""
    from sglang_gen.hub import resolve
    from sglang_gen.plan import checks, idle_settings, make, step_cache, stored_dtype

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
    if plan.run.compile.cuda_graphs or (plan.run.compile.enable_torch_compile and not plan.run.compile.regional):
        raise UserError(
            "sglang tune cache observes the blocks one by one, and the schedule holds with every compilation; run with "
            "compile=none or compile=regional"
        )
    _check_budget(plan, options.budget or 1.0)
    for warning in idle_settings.warnings(composed, plan, IDLE_SETTINGS, "sglang tune cache"):
        log.warning(warning)
    return stored_dtype.require(make.complete(composed, plan, resolve.find_weights(plan.run)))


def _check_budget(plan: "Plan", budget: float) -> None:
    """Refuse a budget that is less than what has to be computed; other requests that the engine cannot carry out too.

    Raises UserError.
    """
    from sglang_gen.backends.native import planned_request, request
    from sglang_gen.tune.plan_bench import SPAN
    from sglang_gen.tune.plan_calibration import sources
    from sglang_gen.tune.plan_schedule import Planner

    checked = request.check_native_request(plan)
    _, numbers = request.evaluations(checked, checked.full_request)
    guided = planned_request.is_guided(plan, checked.full_request, numbers)
    steps = len(guided)
    free = {(source, step, 0): 0.0 for step in range(steps) for source in sources(step, guided, SPAN)}
    least = Planner(free, steps, 1, {0: 0}).least  # steps that are computed if all others compute no block
    if budget * steps < least:
        raise UserError(
            f"--budget is {budget:g}, and at least {least} of {steps} steps have to be computed; give at least "
            f"{math.ceil(1000 * least / steps) / 1000:g}"
        )


def _search(bench: "PlanBench", split: PromptSplit) -> "PlanSearch":
    """Calibrate on one part of the prompts; schedules are measured on the other."""
    from sglang_gen.tune.plan_schedule import PlannedSchedule
    from sglang_gen.tune.plan_search import PlanMeasurement, PlanSearch

    bench.warm_up(split.calibrated[0])
    log.info(f"Calibrating on {len(split.calibrated)} images: {indices(split.calibrated)}")
    planner = bench.calibrate(split.calibrated)
    log.info(f"Measuring on {len(split.measured)} other images: {indices(split.measured)}")
    batches = bench.batches(split.measured)
    exact = bench.exact(batches)

    def measure(schedule: PlannedSchedule) -> PlanMeasurement:
        found = bench.measure(schedule, batches, exact)
        log.info(
            f"{schedule.blocks} of {planner.most} blocks: worst image {found.worst:.2f} dB, mean {found.mean:.2f} dB, "
            f"{found.time:.2f} of the time"
        )
        return found

    return PlanSearch(planner, measure)


def _found(search: "PlanSearch", options: PlanOptions) -> "PlanTrial | None":
    """The trial that fits the options; None if no schedule keeps the bound. Raises UserError."""
    if options.min_psnr is not None:
        return search.bisect(options.min_psnr)
    assert options.budget is not None
    planner = search.planner
    if options.budget * planner.most < planner.least:
        raise UserError(
            f"--budget is {options.budget:g} of {planner.most} blocks, and the smallest schedule computes "
            f"{planner.least}; give at least {math.ceil(1000 * planner.least / planner.most) / 1000:g}"
        )
    return search.try_budget(int(options.budget * planner.most))


def _concluded(
    bench: "PlanBench",
    split: PromptSplit,
    options: PlanOptions,
    search: "PlanSearch",
    found: "PlanTrial | None",
    words: Sequence[str],
) -> int:
    """Print the trials and write the plan. Raises RunError if no schedule keeps the bound."""
    from sglang_gen.tune import plan_report

    lines = plan_report.table(search, found)
    if found is None:
        files.print_result("\n".join(lines))
        raise RunError(
            f"No schedule keeps {options.min_psnr:g} dB for every image with fewer blocks than the exact run; lower "
            "--min-psnr"
        )
    files.save_json(options.output, plan_report.content(bench, split, options, found))
    log.info(f"Cache plan saved to: {options.output}")
    command = shlex.join(plan_report.use(bench.plan, options, words, split.measured[0]))
    files.print_result("\n".join([*lines, "", plan_report.steps_line(found), f"Use it: {command}"]))
    return 0
