"""The steps of a run in order: configuration, plan, preflight, launch."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen import env, files, log, signals
from sglang_gen.config.schema import Weights
from sglang_gen.errors import UserError
from sglang_gen.types import Result

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_gen.config.compose import Composed
    from sglang_gen.launch.session import Session
    from sglang_gen.types import Plan

RANDOM_WEIGHTS = " with random weights: speed and memory are real, images are noise"


def generate(*overrides: str, config: str | Path | None = None, **flags: Any) -> Result | None:
    """Run `sglang generate` from Python.

    `overrides` are Hydra's ("sampling=draft", "parallel=tp2"), keywords are flags with underscores (prompt="a lake",
    num_inference_steps=28), whose values may be paths and numpy's numbers too. Returns None for a dry run, which only
    prints. Raises `errors.UserError` for a request that cannot be carried out and `errors.RunError` when the run fails;
    nothing half-written stays.
    """
    from sglang_gen.config.choices import Choices
    from sglang_gen.config.compose import compose
    from sglang_gen.config.flag_values import python_flags

    place = env.torchrun()
    if place is not None and place.ranks > 1:
        raise UserError(
            f"torchrun has started {place.ranks} processes, and generate() starts its ranks itself: leave it out, "
            "or let it start the command (torchrun ... -m sglang_gen generate)"
        )
    file = None if config is None else str(config)
    return execute(compose(Choices(overrides=overrides, flags=python_flags(flags), file=file)))


def execute(composed: "Composed", session: "Session | None" = None) -> Result | None:
    """Carry out a composed run, in the session of a sweep if there is one; None for a dry run."""
    with signals.heeded():
        return _execute(composed, session)


def _execute(composed: "Composed", session: "Session | None") -> Result | None:
    from sglang_gen.hub import resolve
    from sglang_gen.plan import checks, make

    run = composed.run
    log.setup(run.log_level.name)
    for notice in composed.notices:
        log.info(notice)
    env.prepare_libraries()
    checks.check_request(composed)
    plan = make.make_plan(composed, resolve.find(run.model, weights=False))
    for warning in plan.warnings:
        log.warning(warning)
    if run.dry_run:
        _tell(plan.notices)
        from sglang_gen.dry_run import report

        files.print_result(report.describe(plan))
        return None
    from sglang_gen.launch import kept_reference, launcher

    files.prepare_folder(Path(run.output.path))
    if run.output.perf_dump_path:
        files.prepare_file(Path(run.output.perf_dump_path), stream=True)
    log.info(f"Loading model: {plan.card.name}{RANDOM_WEIGHTS if run.model.weights is Weights.random else ''}")
    _tell(plan.notices)
    if run.sampling.seed is None:
        log.info(f"Seed: {plan.run.sampling.seed} (drawn; set it with --seed to repeat the run)")
    started = time.perf_counter()
    if _may_be_downloaded(plan):
        from sglang_gen.backends.preflight import check_backend

        check_backend(plan)
    plan = kept_reference.with_reference(composed, _from_weights(composed, plan), session)
    if composed.place is not None:
        from sglang_gen.launch import torchrun

        return torchrun.lead(plan, started, composed.place)
    if session is not None:
        return session.run(plan, started)
    return launcher.launch(plan, started, fresh=composed.in_sweep and run.sweep.fresh)


def _may_be_downloaded(plan: "Plan") -> bool:
    """Whether this process runs the preflight before the model is downloaded from a hub.

    On GPUs a launcher of several ranks leaves that to them: it would take memory of a GPU for as long as they run.
    """
    path = plan.run.model.path
    return bool(path and not Path(path).expanduser().exists()) and (plan.device == "cpu" or plan.layout.ranks == 1)


def _from_weights(composed: "Composed", expected: "Plan") -> "Plan":
    """The plan with the model's local files; logs what only they show. Raises UserError as `make.complete` does."""
    from sglang_gen.hub import resolve
    from sglang_gen.plan import make

    plan = make.complete(composed, expected, resolve.find_weights(expected.run))
    for warning in plan.warnings:
        if warning not in expected.warnings:
            log.warning(warning)
    _tell(notice for notice in plan.notices if notice not in expected.notices)
    return plan


def _tell(notices: "Iterable[str]") -> None:
    for notice in notices:
        log.info(notice)
