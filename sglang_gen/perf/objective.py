"""The number of a perf dump that an optimising sweeper minimises or maximises (`perf.objective`)."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from sglang_gen.config.schema import Run
from sglang_gen.errors import RunError, UserError
from sglang_gen.perf.clock import STAGES
from sglang_gen.perf.dump_numbers import times

STEP = "step_ms"  # not a field of the dump: the median denoising step of all repeats
OBJECTIVE_PEAKS = ("allocated_mb", "reserved_mb", "peak_allocated_mb", "peak_reserved_mb", "peak_host_anon_mb")
KNOWN = (
    STEP, "total_duration_ms", "images_per_second",
    *(f"steps.{stage}.duration_ms" for stage in STAGES),
    *(f"memory_checkpoints.{stage}.{peak}" for stage in STAGES for peak in OBJECTIVE_PEAKS),
    "load.duration_ms", "load.imports_ms", "warmup.duration_ms", "warmup.steps",
    "quality.psnr", "quality.ssim", "quality.max_error",
)  # fmt: skip
# Fields whose numbers depend on the run: which of their keys exist is known when it has ended.
OPEN = ("work", "machine", "comm", "ranks", "repeats", "denoise_steps_ms", "requested", "effective", "fingerprint",
        "samples", "cache", "quality.samples")  # fmt: skip


def check(run: Run) -> None:
    """Refuse a key that no dump of this run has. Raises UserError."""
    key = run.perf.objective
    if key is None:
        return
    if key not in KNOWN and not key.startswith(tuple(f"{name}." for name in OPEN)):
        raise UserError(f"perf.objective: '{key}' is no number of the perf dump{_near(key, KNOWN)}")
    needs = {"quality": run.quality.reference, "warmup": run.compile.warmup, "work": run.perf.work}
    names = {"quality": "quality.reference", "warmup": "--warmup", "work": "perf.work=true"}
    head = key.partition(".")[0]
    if head in needs and not needs[head]:
        raise UserError(f"perf.objective: '{key}' needs {names[head]}; without it the perf dump has no such number")


def value(report: Mapping[str, Any], key: str) -> float:
    """The number of the dump `report` at `key`. Raises RunError where there is none."""
    found = numbers(report)
    if key in found:
        return found[key]
    raise RunError(f"perf.objective: the perf dump of this run has no number '{key}'{_near(key, found)}")


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of a dump by its dotted key; entries of a list by their name or their number."""
    steps = times(report).get("step")
    own = {} if steps is None else {STEP: round(1000 * steps.median, 3)}
    return own | _flat(report, "")


def _flat(item: Any, key: str) -> dict[str, float]:
    if isinstance(item, bool) or not isinstance(item, (int, float, Mapping, list)):
        return {}
    if isinstance(item, (int, float)):
        return {key: item} if math.isfinite(item) else {}
    pairs = item.items() if isinstance(item, Mapping) else _numbered(item)
    prefix = f"{key}." if key else ""
    return {path: number for name, inner in pairs for path, number in _flat(inner, f"{prefix}{name}").items()}


def _numbered(items: list[Any]) -> list[tuple[str, Any]]:
    """Stages have names, steps and ranks have numbers."""
    return [
        (str(each["name"]) if isinstance(each, Mapping) and "name" in each else str(index), each)
        for index, each in enumerate(items)
    ]


def _near(key: str, legal: Any) -> str:
    close = difflib.get_close_matches(key, legal, n=3, cutoff=0.5)
    tails = [name for name in legal if key and key in name.split(".")] or [name for name in legal if key in name]
    named = list(dict.fromkeys([*tails[:3], *close]))[:3]
    return f"; did you mean {' or '.join(repr(name) for name in named)}?" if named else f" (such as {STEP})"
