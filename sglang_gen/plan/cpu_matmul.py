"""The library of float32 matrix products on a CPU (backend.float32_matmul)."""

from dataclasses import replace

from sglang_gen.config.schema import Matmul
from sglang_gen.errors import UserError
from sglang_gen.perf import cpu_dtype
from sglang_gen.types import Plan


def settle(plan: Plan) -> Plan:
    """The plan with the library that the native engine uses, once the dtype is known.

    A setting that has no effect is a warning. Raises UserError for oneDNN if this build of torch does not have it.
    """
    wanted = plan.run.backend.float32_matmul
    reason = _unused(plan)
    if reason is None and wanted is Matmul.onednn and not _has_onednn():
        raise UserError("backend.float32_matmul=onednn: this build of torch has no oneDNN; leave it out")
    if reason is None:
        chosen = cpu_dtype.fastest_matmul() if wanted is Matmul.auto else wanted.name
        return replace(plan, matmul=chosen, effective={**plan.effective, "float32_matmul": chosen})
    effective = {key: value for key, value in plan.effective.items() if key != "float32_matmul"}
    plan = replace(plan, matmul="torch", effective=effective)
    warning = f"backend.float32_matmul={wanted.name} has no effect: {reason}"
    if wanted is Matmul.auto or warning in plan.warnings:
        return plan
    return replace(plan, warnings=(*plan.warnings, warning))


def _unused(plan: Plan) -> str | None:
    """Why this run has no float32 products on a CPU in the native engine; None if it has."""
    if plan.backend != "sglang":
        return "the diffusers backend uses torch's own products"
    if plan.device != "cpu":
        return "this run computes on a GPU"
    return None if plan.dtype == "float32" else f"this run computes in {plan.dtype}"


def _has_onednn() -> bool:
    from sglang_gen.models.matmul import has_onednn  # imports torch

    return has_onednn()
