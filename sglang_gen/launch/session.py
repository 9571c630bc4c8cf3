"""Processes and weights that the jobs of a sweep share. Either this process or ranks have weights, never both."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from sglang_gen.launch import launcher
from sglang_gen.types import Plan, Result

if TYPE_CHECKING:
    from sglang_gen.launch.kept_weights import KeptWeights


class Session:
    """Carries out one plan after another."""

    def __init__(self) -> None:
        self._kept: KeptWeights | None = None  # in this process
        self._ranks: launcher.Ranks | None = None
        self._ending = ExitStack()  # ends the ranks

    def run(self, plan: Plan, started: float) -> Result:
        """Carry out a plan in new processes (sweep.fresh), in this process, or on the ranks of the last plan.

        Raises the errors of `launcher.launch`.
        """
        if plan.run.sweep.fresh:
            self.close()
            return launcher.launch(plan, started, fresh=True)
        if plan.layout.ranks == 1:
            return self._in_this_process(plan, started)
        return self._on_ranks(plan, started)

    def alone(self, plan: Plan, started: float) -> Result:
        """Carry out a plan that is no job of the sweep in a process of its own, with all memory."""
        self.close()
        return launcher.launch(plan, started, fresh=True)

    def _in_this_process(self, plan: Plan, started: float) -> Result:
        from sglang_gen.launch.kept_weights import KeptWeights

        self._end_ranks()
        self._kept = self._kept or KeptWeights(keeps=True)
        return launcher.here(plan, started, self._kept)

    def _on_ranks(self, plan: Plan, started: float) -> Result:
        if self._kept is not None:
            self._kept.release()
        if self._ranks is None or not self._ranks.fit(plan):
            self._end_ranks()
            self._ranks = self._ending.enter_context(launcher.open_ranks(plan.layout.ranks, plan.device))
        try:
            return self._ranks.run(plan, started, keep=True)
        except BaseException:  # their process group is broken
            self._end_ranks()
            raise

    def _end_ranks(self) -> None:
        self._ranks = None
        self._ending.close()

    def close(self) -> None:
        """Release the weights and end the processes."""
        self._end_ranks()
        if self._kept is not None:
            self._kept.release()
