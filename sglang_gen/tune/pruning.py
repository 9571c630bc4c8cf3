"""Rules out candidates by the estimates of a dry run, before they are measured."""

import math
from dataclasses import dataclass

from sglang_gen import env
from sglang_gen.dry_run.estimate import estimate
from sglang_gen.errors import UserError
from sglang_gen.types import Plan

MOST_PREDICTED = 1.3  # times the predicted step of the base; predictions are less exact than measurements


@dataclass(frozen=True)
class Obstacles:
    """Why a candidate cannot keep the bounds or be measured, and how many times as long as the base it is predicted to
    take; None if it can, and if it is not clearly slower.
    """

    refusal: str | None = None
    slowness: float | None = None


def obstacles(plan: Plan, base: Plan, max_memory: float) -> Obstacles:
    """What the estimates say against a candidate.

    The estimated memory is that of weights and activations, without the libraries of the process, so that a candidate
    whose estimate exceeds the bound exceeds it when it runs.
    """
    if plan.device == "cpu" and plan.layout.ranks > env.cpu_count() >= base.layout.ranks:
        return Obstacles(f"{plan.layout.ranks} processes share {env.cpu_count()} processors, so that none is faster")
    try:
        of_base = estimate(base)
        if math.isinf(max_memory) and _predicted_step(of_base) is None:
            return Obstacles()
        own = estimate(plan)
    except UserError as error:
        return Obstacles(str(error))
    if "reason" in own:  # only the native engine is estimated
        return Obstacles()
    needed = own["memory"]["total"]
    if needed > max_memory:
        return Obstacles(
            f"it needs at least {needed / 1e9:.3g} GB per rank, and --max-memory is {max_memory / 1e9:.3g} GB"
        )
    return Obstacles(slowness=_slower(own, of_base))


def _slower(own: dict[str, object], base: dict[str, object]) -> float | None:
    """The predicted ratio of a candidate that is clearly slower, where the machine's rates are known."""
    step, of_base = (_predicted_step(one) for one in (own, base))
    if step is None or of_base is None or step <= MOST_PREDICTED * of_base:
        return None
    return step / of_base


def _predicted_step(estimated: dict[str, object]) -> float | None:
    prediction = estimated.get("prediction")
    value = prediction.get("step_ms") if isinstance(prediction, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None
