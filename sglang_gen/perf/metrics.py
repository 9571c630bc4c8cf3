"""Further measures of images: functions that installed packages offer as entry points of the group sglang_gen.metrics.

A metric is a callable `(image, reference, prompt) -> float`. `image` and `reference` are uint8 arrays `[H, W, 3]`;
`reference` is None if there is none. Higher values are better, unless the function has `higher_is_better = False`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_gen import env
from sglang_gen.errors import LOADING_ERRORS, RunError, UserError, in_our_words, nearest
from sglang_gen.perf import agreement, attributes

if TYPE_CHECKING:
    import numpy as np

    Frame = np.ndarray[Any, np.dtype[np.uint8]]

GROUP = "sglang_gen.metrics"
Metric = Callable[["Frame", "Frame | None", str], float]


def check_names(names: Sequence[str]) -> None:
    """Raises UserError for a metric that no installed package offers. Imports none of them."""
    offered = env.entry_points(GROUP)
    for name in names:
        if name in agreement.HIGHER_IS_BETTER:
            raise UserError(f"quality.metrics: '{name}' is always measured against quality.reference; leave it out")
        if name == attributes.ACCURACY:
            raise UserError(f"quality.metrics: '{name}' is always measured for a model with attributes; leave it out")
        if name not in offered:
            known = ", ".join(sorted(offered)) or "none"
            clause = f"no installed package offers the metric '{name}'{nearest(name, offered)}"
            raise UserError(f"quality.metrics: {clause} (installed: {known})")


def load(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics by name. Raises UserError for one that cannot be imported."""
    offered, loaded = env.entry_points(GROUP), {}
    for name in dict.fromkeys(names):
        try:
            loaded[name] = offered[name].load()
        except LOADING_ERRORS as error:
            raise UserError(f"quality.metrics: the metric '{name}' cannot be loaded: {in_our_words(error)}") from error
        if not callable(loaded[name]):
            raise UserError(f"quality.metrics: the metric '{name}' ({offered[name].value}) is not a function")
    return loaded


def measure(
    metrics: Mapping[str, Metric],
    entries: Sequence[dict[str, Any]],
    frames: Sequence["Frame"],
    references: Sequence["Frame"] | None,
) -> dict[str, Any]:
    """Add `metrics`, and with references `reference_metrics`, to the entries. Returns the summary of each metric.

    With references a summary also has `{reference_mean, difference, difference_error}`: the mean of the paired
    differences to the same metric of the reference, and its standard error. The worst image is then the one with the
    worst difference. Raises RunError for a metric that fails or returns no finite number.
    """
    others = references if references is not None else [None] * len(frames)
    for entry, frame, other in zip(entries, frames, others, strict=True):
        entry["metrics"] = {name: _value(name, metric, frame, other, entry) for name, metric in metrics.items()}
        if other is not None:
            entry["reference_metrics"] = {
                name: _value(name, metric, other, other, entry) for name, metric in metrics.items()
            }
    return {name: _summary(name, metric, entries) for name, metric in metrics.items()}


def sentence(summary: Mapping[str, Any]) -> str:
    """The summary of a metric as a phrase for the log."""

    def error(value: float | None) -> str:
        return "" if value is None else f" ± {value:.2g}"

    if "difference" not in summary:
        return f"{summary['mean']:.6g}{error(summary['standard_error'])}"
    paired = f"{summary['difference']:+.4g}{error(summary['difference_error'])}"
    return f"{summary['mean']:.6g}, paired difference to the reference {paired}"


def _summary(name: str, metric: Metric, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    paired = "reference_metrics" in entries[0]
    return agreement.compared_summary(
        [entry["metrics"][name] for entry in entries],
        [entry["reference_metrics"][name] for entry in entries] if paired else None,
        entries,
        bool(getattr(metric, "higher_is_better", True)),
    )


def _value(name: str, metric: Metric, frame: "Frame", other: "Frame | None", entry: Mapping[str, Any]) -> float:
    where = f"The metric '{name}' of sample {entry['index']}"
    try:
        value = float(metric(frame, other, str(entry["prompt"])))
    except (*LOADING_ERRORS, ArithmeticError, LookupError, AssertionError) as error:
        raise RunError(f"{where} failed: {in_our_words(error)}") from error
    if not math.isfinite(value):
        raise RunError(f"{where} is not finite: {value}")
    return round(value, 6)
