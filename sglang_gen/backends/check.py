"""What a plan's backend refuses before it reads a weight; of a hub's model, before one is downloaded."""

from sglang_gen.types import Plan


def check(plan: Plan) -> None:
    """Raises UserError. What a repository's own code takes, it alone knows: that is refused while it loads."""
    if plan.backend == "sglang":
        from sglang_gen.backends import asked

        asked.check(plan)
    elif not plan.card.code:
        from sglang_gen.backends import diffusers

        diffusers.check(plan)
