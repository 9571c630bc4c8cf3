"""Settings of a request that a command has no use for, such as those of saving where nothing is saved."""

from collections.abc import Iterator

from sglang_gen.config.compose import Composed
from sglang_gen.config.schema import leaves, user_gave
from sglang_gen.types import Plan


def warnings(composed: Composed, plan: Plan, idle: tuple[str, ...], command: str) -> Iterator[str]:
    """The plan's warnings but for those about `idle` settings, and one for each idle setting that the user gave.

    `idle` holds the beginnings of config paths, such as `output.`.
    """
    yield from (warning for warning in plan.warnings if not warning.startswith(idle))
    for path in leaves():
        if path.startswith(idle) and user_gave(composed.run, composed.sources, path):
            yield f"{path} has no effect on {command}"
