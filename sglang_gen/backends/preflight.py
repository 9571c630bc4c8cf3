"""What a plan's backend refuses before it reads a weight; of a hub's model, before one is downloaded."""

from sglang_gen.types import Plan


def check(plan: Plan, warn: bool = False) -> None:
    """With `warn` the backend also says what has no effect, as it does when it loads.

    Raises UserError. What a repository's own code takes, it alone knows: that is refused while it loads.
    """
    if plan.backend == "sglang":
        from sglang_gen.backends.native import request

        found = request.check(plan)
        if warn:
            request.warn_ineffective(plan, found.pipeline)
    elif not plan.card.code:
        from sglang_gen.backends.diffusers import engine

        engine.check(plan, warn=warn)
