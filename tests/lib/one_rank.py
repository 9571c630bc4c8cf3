"""The one rank of a session in this process, in place of a process that takes seconds to import torch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from sglang_gen.launch import launcher, rank
from sglang_gen.launch.kept_weights import KeptWeights
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Plan, Result


class OneRank:
    """Has the methods of `launcher.Ranks` that a session calls."""

    def __init__(self, device: str) -> None:
        self.device, self.kept = device, KeptWeights(keeps=True)

    def fit(self, plan: Plan) -> bool:
        return (plan.layout.ranks, plan.device) == (1, self.device)

    def run(self, plan: Plan, started: float, keep: bool = False) -> Result:
        assert keep
        result = rank.run(plan, Mesh(), started, self.kept)
        assert result is not None
        return result


@contextmanager
def _here(device: str) -> Iterator[OneRank]:
    made = OneRank(device)
    try:
        yield made
    finally:
        made.kept.release()


def processes(plan: Plan) -> AbstractContextManager[OneRank | launcher.Ranks]:
    """In place of `session.processes`."""
    return _here(plan.device) if plan.layout.ranks == 1 else launcher.open_ranks(plan.layout.ranks, plan.device)
