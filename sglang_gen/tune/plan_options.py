"""The options of `sglang tune cache` beside those of `sglang generate`, and its help page."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError
from sglang_gen.tune.decibels import decibels, finite
from sglang_gen.tune.prompt_split import DEFAULT_CALIBRATION

PLAN_OPTIONS = ("min-psnr", "budget", "output", "calibration-prompts")
DEFAULT_OUTPUT = "cache_plan.json"
# Settings of prompts and of what is saved, which the printed command leaves out.
LEFT_OUT = ("sampling.prompt", "sampling.num_samples", "sampling.seed", "quality.", "output.", "perf.", "tracking")
# Options of `sglang generate` that print or run something else.
OTHER_RUNS = ("multirun", "cfg", "package", "info", "resolve", "hydra_help", "run", "version")

CACHE_PLAN_HELP = f"""\
usage: sglang tune cache (--min-psnr DB | --budget FRACTION) [options] [flags and overrides of sglang generate]

Find a fixed schedule for the step cache of a request: which steps are computed, and how many first blocks the others
compute. Calibration measures the error of reusing each step on some of the prompts; dynamic programming finds the
schedule with the least sum of errors for every number of computed blocks. The images of the other prompts, which were
not used for calibration, are compared with those of the exact run. The schedule is written to a file, which
sglang generate takes as cache=planned cache.plan_file=FILE for the same model, size, scheduler, steps, dtype and guidance.

Examples:
  sglang tune cache --min-psnr 38
  sglang tune cache --budget 0.5 --output half.json --model-path FOLDER sampling.prompts_file=prompts.txt

options:
  --min-psnr DB             find the fewest computed blocks with which every image keeps this PSNR
  --budget FRACTION         compute at most this fraction of all blocks
  --output FILE             file of the schedule (default: {DEFAULT_OUTPUT})
  --calibration-prompts N   prompts for calibration (default: half of them, at most {DEFAULT_CALIBRATION}); the others are measured
  -h, --help                show this help

exit codes: 0 a schedule was written, 1 none keeps the bound or the run failed, 2 wrong request"""  # noqa: E501


@dataclass(frozen=True)
class PlanOptions:
    """What the schedule is for: one of `min_psnr` in dB and `budget` as a fraction of all blocks is given."""

    min_psnr: float | None
    budget: float | None
    output: Path
    calibration_prompts: int | None


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    for name in PLAN_OPTIONS:
        parser.add_argument(f"--{name}", dest=f"plan.{name}")


def read_plan_options(given: Mapping[str, Any]) -> PlanOptions:
    """The options of a parsed command line. Raises UserError for a value that is missing or not possible."""
    for name in OTHER_RUNS:
        if name in given:
            raise UserError(f"sglang tune cache decides itself what it runs; leave out --{name.replace('_', '-')}")
    psnr, budget, output, prompts = (given.get(f"plan.{name}") for name in PLAN_OPTIONS)
    if (psnr is None) == (budget is None):
        raise UserError(
            "sglang tune cache needs either --min-psnr, the PSNR that every image must keep, or --budget, the fraction "
            "of the blocks that are computed"
        )
    return PlanOptions(
        None if psnr is None else decibels(psnr),
        None if budget is None else _fraction(budget),
        Path(output or DEFAULT_OUTPUT).expanduser(),
        None if prompts is None else _count(prompts),
    )


def _fraction(text: str) -> float:
    value = finite(text)
    if value is None or not 0 < value <= 1:
        raise UserError(f"--budget: '{text}' is not a fraction above 0 and at most 1, such as 0.5")
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--calibration-prompts: '{text}' is not a whole number of at least 1")
    return int(text)


def kept_words(parser: argparse.ArgumentParser, options: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The options and overrides of the request that the printed command repeats: all but prompts and this command's."""
    actions = parser._option_string_actions
    others = [word for word in options if not actions[word.partition("=")[0]].dest.startswith(("plan.", *LEFT_OUT))]
    return [*others, *(word for word in overrides if not word.lstrip("+").startswith(LEFT_OUT))]
