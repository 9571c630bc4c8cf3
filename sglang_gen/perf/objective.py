"""`perf.objective`: the number of a perf dump that an optimizing sweeper minimizes or maximizes."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from sglang_gen.config.schema import Run
from sglang_gen.errors import RunError, UserError
from sglang_gen.perf.attributes import ACCURACY
from sglang_gen.perf.clock import STAGES
from sglang_gen.perf.dump_numbers import times

STEP = "step_ms"  # not a field of the dump: the median denoising step of all repeats
OBJECTIVE_PEAKS = ("allocated_mb", "reserved_mb", "peak_allocated_mb", "peak_reserved_mb", "peak_host_anon_mb")
QUALITY_NUMBERS = ("quality.psnr", "quality.ssim", "quality.max_error")
ATTRIBUTES = f"quality.{ACCURACY}"
KNOWN = (
    STEP, "total_duration_ms", "cpu_duration_ms", "images_per_second",
    *(f"steps.{stage}.duration_ms" for stage in STAGES),
    *(f"memory_checkpoints.{stage}.{peak}" for stage in STAGES for peak in OBJECTIVE_PEAKS),
    "load.duration_ms", "load.imports_ms", "warmup.duration_ms", "warmup.steps",
    *QUALITY_NUMBERS, ATTRIBUTES, "energy_j.total", "energy_j.per_image",
)  # fmt: skip
# Fields whose keys depend on the run and are known only when it has ended.
OPEN = ("work", "predicted", "machine", "comm", "ranks", "repeats", "denoise_steps_ms", "requested", "effective",
        "fingerprint", "samples", "cache", "block_timings_ms", "quality.samples", "quality.summary",
        "quality.attributes", "energy_j.sources")  # fmt: skip


def check_objective(run: Run) -> None:
    """Refuse a key that the dump of this run cannot have. Raises UserError."""
    key = run.perf.objective
    if key is None:
        return
    if key not in KNOWN and not key.startswith(tuple(f"{name}." for name in OPEN)):
        raise UserError(f"perf.objective: '{key}' is not a number of the perf dump{_near(key, KNOWN)}")
    measured = key.startswith("quality.summary.") and run.quality.metrics
    judged = is_about_attributes(key) and run.quality.manifest
    needs = {
        "quality": run.quality.reference or measured or judged,
        "warmup": run.compile.warmup,
        "work": run.perf.work,
        "predicted": run.perf.work,
        "block_timings_ms": run.perf.blocks,
    }
    names = {
        "quality": "quality.reference or quality.manifest" if is_about_attributes(key) else "quality.reference",
        "warmup": "--warmup",
        "work": "perf.work=true",
        "predicted": "perf.work=true",
        "block_timings_ms": "perf.blocks=true",
    }
    head = key.partition(".")[0]
    if head in needs and not needs[head]:
        raise UserError(f"perf.objective: '{key}' needs {names[head]}; without it the perf dump has no such number")


def is_about_attributes(key: str) -> bool:
    """Whether only a model with attributes has this number."""
    return key == ATTRIBUTES or key.startswith(("quality.attributes.", f"quality.summary.{ACCURACY}."))


def value(report: Mapping[str, Any], key: str) -> float:
    """The number at `key` in the dump `report`. Raises RunError if there is none."""
    known = numbers(report)
    if key in known:
        return known[key]
    raise RunError(f"perf.objective: the perf dump of this run has no number '{key}'{_near(key, known)}")


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of a dump by its dotted key; list entries are keyed by their name or index."""
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
    """List entries with their keys: the name of a stage, the index of a step or rank."""
    return [
        (str(item["name"]) if isinstance(item, Mapping) and "name" in item else str(index), item)
        for index, item in enumerate(items)
    ]


def _near(key: str, legal: Any) -> str:
    close = difflib.get_close_matches(key, legal, n=3, cutoff=0.5)
    tails = [name for name in legal if key and key in name.split(".")] or [name for name in legal if key in name]
    named = list(dict.fromkeys([*tails[:3], *close]))[:3]
    return f"; did you mean {' or '.join(repr(name) for name in named)}?" if named else f" (such as {STEP})"
