"""The options of `sglang tune` beside those of `sglang generate`, and their values."""

import argparse
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_gen.errors import UserError, nearest
from sglang_gen.tune.decibels import decibels, finite

DEFAULT_BUDGET = "20m"
TIME_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
MEMORY_UNITS = {"mb": 1e6, "gb": 1e9, "mib": 2.0**20, "gib": 2.0**30}
CLOCKS = ("elapsed", "processor")  # values of --time
OWN_OPTIONS = ("min-psnr", "max-memory", "budget", "time", "axes", "baseline", "name")
# Options of `sglang generate` that print or run something else.
OTHER_COMMANDS = ("multirun", "cfg", "package", "info", "resolve", "hydra_help", "run", "config_name", "version")


@dataclass(frozen=True)
class TuningOptions:
    """What the search is for: the bounds, its budget, and the settings that it may change."""

    min_psnr: float  # dB
    max_memory: float  # bytes; infinite if no bound was given
    budget: float  # seconds
    axes: tuple[str, ...] | None  # None: those that are searched by default
    baseline: tuple[str, ...]  # overrides of a configuration to compare with; empty: none
    name: str | None  # of the experiment
    by_processor: bool = False  # compare processor time in place of elapsed time


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    for name in OWN_OPTIONS:
        parser.add_argument(f"--{name}", dest=f"tune.{name}")


def read_tuning_options(given: Mapping[str, Any]) -> TuningOptions:
    """The options of a parsed command line. Raises UserError for a value that is missing or cannot be one."""
    for name in OTHER_COMMANDS:
        if name in given:
            raise UserError(f"sglang tune decides itself what it runs; leave out --{name.replace('_', '-')}")
    own = {name: given.get(f"tune.{name}") for name in OWN_OPTIONS}
    if own["min-psnr"] is None:
        raise UserError("sglang tune needs the PSNR that every image must keep, such as --min-psnr 34")
    return TuningOptions(
        min_psnr=decibels(own["min-psnr"]),
        max_memory=math.inf if own["max-memory"] is None else _memory(own["max-memory"]),
        budget=_duration(DEFAULT_BUDGET if own["budget"] is None else own["budget"]),
        axes=None if own["axes"] is None else _names(own["axes"]),
        baseline=() if own["baseline"] is None else _overrides(own["baseline"]),
        name=None if own["name"] is None else _name(own["name"]),
        by_processor=own["time"] is not None and _clock(own["time"]) == "processor",
    )


def _memory(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)\s*([a-z]+)", text.lower())
    value = finite(found[1]) if found and found[2] in MEMORY_UNITS else None
    if found is None or value is None or value <= 0:
        raise UserError(f"--max-memory: '{text}' is not an amount above 0 in MB, GB, MiB or GiB, such as 4GB")
    return value * MEMORY_UNITS[found[2]]


def _duration(text: str) -> float:
    parts = re.findall(r"([\d.]+)\s*([a-z]+)\s*", text.lower())
    is_whole = bool(re.fullmatch(r"(?:[\d.]+\s*[a-z]+\s*)+", text.lower()))
    values = [(finite(number), unit) for number, unit in parts]
    known = [value * TIME_UNITS[unit] for value, unit in values if value is not None and unit in TIME_UNITS]
    if not is_whole or len(known) < len(values) or not 0 < sum(known) < math.inf:
        raise UserError(f"--budget: '{text}' is not a duration above 0 in s, m or h, such as 20m or 1h30m")
    return sum(known)


def _clock(text: str) -> str:
    if text not in CLOCKS:
        raise UserError(f"--time: '{text}' is not one of {' and '.join(CLOCKS)}{nearest(text, CLOCKS)}")
    return text


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"--axes: '{text}' is not a list of different names, such as dtype,compile")
    return names


def _overrides(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError:
        words = ()
    if not words or not all("=" in word and not word.startswith("-") for word in words):
        raise UserError(
            f"--baseline: '{text}' is not a list of overrides in quotes, such as 'backend=diffusers dtype=float32'"
        )
    return words


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]\w{0,99}", text, re.ASCII):
        raise UserError(f"--name: '{text}' is not the name of an experiment: letters, digits and underscores")
    return text
