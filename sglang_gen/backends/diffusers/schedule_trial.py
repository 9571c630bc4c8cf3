"""Sets a scheduler's timesteps as a diffusers pipeline does, before a weight is read."""

import ast
import copy
import inspect
from typing import Any

import numpy as np

from sglang_gen.backends.diffusers.pipeline_signature import Kind, source_of_call
from sglang_gen.errors import UserError

MU = 1.0  # a dynamic shift as pipelines compute it from the size of the image
REFUSALS = (AssertionError, TypeError, ValueError)  # of schedulers and of `retrieve_timesteps`


def check_schedule(kind: Kind, scheduler: Any, steps: int) -> None:
    """Refuse a scheduler that does not take the noise levels or the shift that the pipeline passes to it.

    Raises UserError. `scheduler` is not changed.
    """
    retrieve, source = getattr(inspect.getmodule(kind.pipeline_class), "retrieve_timesteps", None), source_of_call(kind)
    if retrieve is None or not source:
        return
    tree = ast.parse(source)
    passed = _passed(tree)
    if not passed or not passed <= {"sigmas", "mu"}:
        return
    given: dict[str, Any] = {"mu": MU} if "mu" in passed else {}
    replaced = "use_flow_sigmas" in source and scheduler.config.get("use_flow_sigmas")
    if "sigmas" in passed and not replaced and _makes_levels(tree):
        given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    try:
        retrieve(copy.deepcopy(scheduler), steps, "cpu", **given)
    except REFUSALS as error:
        needs = {"sigmas": "noise levels of its own", "mu": "a shift that depends on the image's size"}
        what = " and ".join(needs[name] for name in ("sigmas", "mu") if name in given)
        raise UserError(
            f"{kind.pipeline_class.__name__} gives its scheduler {what}, which {type(scheduler).__name__} does not "
            "take with this configuration; use another scheduler, such as FlowMatchEulerDiscreteScheduler, or set "
            "use_dynamic_shifting and use_flow_sigmas in its config if it has them"
        ) from error


def _passed(tree: ast.AST) -> set[str]:
    """Keywords of the only call of `retrieve_timesteps`; empty if there is none, or if some are not known by name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == "retrieve_timesteps"]
    if len(calls) != 1 or any(word.arg is None for word in calls[0].keywords):
        return set()
    return {str(word.arg) for word in calls[0].keywords} - {"device"}


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _makes_levels(tree: ast.AST) -> bool:
    """Whether the pipeline makes noise levels if its caller gives none: it assigns to `sigmas`."""
    assigned = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
    return any(
        _name(target) == "sigmas" and "linspace" in ast.unparse(node.value)
        for node in assigned
        for target in node.targets
    )
