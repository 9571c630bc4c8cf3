"""The command `sglang debug`. Imports torch only when it compares."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang_gen import files, log
from sglang_gen.config.schema import BackendName
from sglang_gen.debug import report
from sglang_gen.debug.verdict import PARITY_TOLERANCES, Tolerance
from sglang_gen.errors import UserError, nearest

if TYPE_CHECKING:
    from sglang_gen.config.compose import Composed
    from sglang_gen.types import ModelCard, Plan

DEBUG_HELP = """\
usage: sglang debug COMMAND ...

commands:
  parity    find the first module in which the native engine and diffusers differ (sglang debug parity --help)"""

PARITY_HELP = """\
usage: sglang debug parity [flags and overrides of sglang generate] [options]

Run a request on both backends with the same inputs and compare them in the order of computation: encoded text,
schedule, initial latents, all modules of the network at every step, guidance, scheduler, final latents and image. The
network, scheduler and decoder of the native engine get the inputs of those of diffusers, so the first module that
differs contains the cause. Only the first batch is compared, and nothing is saved.

Example:
  sglang debug parity --model-path FOLDER --prompt "a lake" --seed 1 --num-inference-steps 4 dtype=float32

options:
  --tolerance X   largest error max|a-b| / max|b| that counts as rounding. Defaults for a module and for the network:
{tolerances}
  --json          print the report as JSON instead of a table
  -h, --help      show this help

verdicts: bit-exact, numerically equal, different. The last line of the report names the first module that differs.
exit codes: 0 bit-exact or numerically equal, 1 different, 2 wrong request""".format(
    tolerances="\n".join(
        f"{'':18}{dtype:10}{tolerance.module:g}, {tolerance.whole:g}" for dtype, tolerance in PARITY_TOLERANCES.items()
    )
)
# Options of `sglang generate` that print or run something else.
FOREIGN = ("multirun", "cfg", "package", "info", "resolve", "hydra_help", "version")
# Settings without effect here: both backends run once, and nothing is saved.
IDLE = ("backend.name", "output.", "perf.", "quality.", "tracking.", "machine.", "compile.warmup", "dry_run")


def main(argv: Sequence[str]) -> int:
    """`sglang debug` without a known command: print the help, or raise UserError."""
    if not argv or argv[0] in ("-h", "--help"):
        files.print_result(DEBUG_HELP)
        return 0 if argv else 2
    raise UserError(f"Unknown command 'debug {argv[0]}'{nearest(argv[0], ['parity'])} (commands: parity)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sglang debug parity` that `sglang generate` does not have."""
    parser.add_argument("--tolerance", dest="tolerance")
    parser.add_argument("--json", dest="json", action="store_true")


def check_parity_options(given: Mapping[str, Any]) -> None:
    """Raises UserError for an option of `sglang generate` that has no meaning here, and for an invalid tolerance."""
    for name in FOREIGN:
        if name in given:
            raise UserError(f"sglang debug parity compares one run; leave out --{name.replace('_', '-')}")
    _tolerance(given)


def _tolerance(given: Mapping[str, Any]) -> Tolerance | None:
    if "tolerance" not in given:
        return None
    try:
        value = float(given["tolerance"])
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UserError(f"--tolerance: '{given['tolerance']}' is not a number of at least 0, such as 1e-5")
    return Tolerance(value, value)


def parity(composed: "Composed", given: Mapping[str, Any]) -> int:
    """`sglang debug parity`: print the report, return its exit code. Raises UserError and RunError."""
    from sglang_gen import env

    log.setup(composed.run.log_level.name)
    for notice in composed.notices:
        log.info(notice)
    env.prepare_libraries()
    ours, theirs = plans(composed)
    tolerance = _tolerance(given)
    from sglang_gen.debug.parity import run

    result = run(ours, theirs, PARITY_TOLERANCES[ours.dtype] if tolerance is None else tolerance)
    files.print_result(
        json.dumps(report.as_json(result), indent=2, ensure_ascii=False) if "json" in given else report.text(result)
    )
    return report.PARITY_EXIT_CODES[result.verdict]


def plans(composed: "Composed") -> tuple["Plan", "Plan"]:
    """The same plan for the native engine and for diffusers, with the weights in the cache. Raises UserError."""
    from sglang_gen.config import prompts
    from sglang_gen.hub import resolve
    from sglang_gen.plan import checks, stored_dtype
    from sglang_gen.plan import make as planning

    checks.check_request(composed)
    composed = replace(composed, run=prompts.pin(composed.run))  # one drawn seed for both
    _warn(composed, _checked(composed, resolve.find(composed.run.model, weights=False)))
    card = resolve.find(composed.run.model, weights=True)
    _checked(composed, card)
    ours, theirs = (
        planning.make_plan(_on(composed, name), card) for name in (BackendName.sglang, BackendName.diffusers)
    )
    return stored_dtype.require(ours), stored_dtype.require(theirs)


def _checked(composed: "Composed", card: "ModelCard") -> "Plan":
    """The plan with backend=auto. Raises UserError if one of the backends cannot run it."""
    from sglang_gen.plan import backend_choice, offloading
    from sglang_gen.plan import make as planning

    _refuse_native_only(composed, card)
    plan = planning.make_plan(_on(composed, BackendName.auto), card)
    _, reason = backend_choice.choose(plan.run, card, plan.device)
    if reason is not None:
        raise UserError(f"sglang debug parity runs both backends, and the native engine cannot run this: {reason}")
    spec = backend_choice.family(plan.run, card)
    if spec is not None and (spec.video is not None or len(spec.networks_of(card)) > 1):
        raise UserError(
            f"sglang debug parity compares images of one denoising network, and {spec.pipeline_class} makes "
            f"{spec.makes} with {' and '.join(spec.networks_of(card))}"
        )
    if offloading.active(plan.run, plan.device):
        raise UserError(
            "sglang debug parity evaluates networks outside of a generation, when offloaded ones are on the host; "
            "leave out the options of offload"
        )
    if plan.layout.ranks > 1:
        raise UserError("sglang debug parity runs on one rank; leave out the settings of parallel")
    return plan


def _refuse_native_only(composed: "Composed", card: "ModelCard") -> None:
    """Raises UserError for a model or a setting that only the native engine has."""
    from sglang_gen.hub import component_classes
    from sglang_gen.plan import backend_choice

    both, spec = "sglang debug parity runs both backends, and", backend_choice.family(composed.run, card)
    if spec is not None and not component_classes.in_diffusers(spec.pipeline_class):
        raise UserError(f"{both} only the native engine has {spec.pipeline_class}")
    for path, is_requested in backend_choice.NATIVE_ONLY:
        if is_requested(composed.run):
            raise UserError(f"{both} only the native engine has {path}; leave it out")


def _on(composed: "Composed", name: BackendName) -> "Composed":
    run = composed.run
    return replace(composed, run=replace(run, backend=replace(run.backend, name=name)))


def _warn(composed: "Composed", plan: "Plan") -> None:
    from sglang_gen.plan import idle_settings

    for warning in idle_settings.warnings(composed, plan, IDLE, "sglang debug parity"):
        log.warning(warning)
    if len(plan.batches) > 1:
        log.warning(f"Only the first of {len(plan.batches)} batches is compared")
