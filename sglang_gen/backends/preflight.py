"""Checks of a plan by its backend, before weights are downloaded or read."""

from sglang_gen.types import Plan


def check_backend(plan: Plan, warn: bool = False) -> None:
    """Ask the backend of a plan; `warn` also logs settings without effect.

    Raises UserError. The arguments of a pipeline that a repository defines are known only once its code is loaded.
    """
    if plan.backend == "sglang":
        from sglang_gen.backends.native import request

        found = request.check_native_request(plan)
        if warn:
            request.warn_ineffective(plan, found.pipeline)
    elif not plan.card.code:
        from sglang_gen.backends.diffusers import engine

        engine.check_pipeline_call(plan, warn=warn)
