"""Processes and weights that the jobs of a sweep share.

Also a job of one rank runs in a process of its own: the memory of the sweep is not counted as the job's, and a job that
is killed does not end the sweep.
"""

from contextlib import AbstractContextManager, ExitStack

from sglang_gen.launch import launcher
from sglang_gen.types import Plan, Result


def processes(plan: Plan) -> AbstractContextManager[launcher.Ranks]:
    """Context with as many processes as the plan has ranks."""
    return launcher.open_ranks(plan.layout.ranks, plan.device)


class Session:
    """Carries out one plan after another."""

    def __init__(self) -> None:
        self._ranks: launcher.Ranks | None = None
        self._ending = ExitStack()  # ends the ranks

    def run(self, plan: Plan, started: float) -> Result:
        """Carry out a plan in new processes (sweep.fresh) or in those of the last plan, which have kept its weights.

        Raises the errors of `launcher.launch`.
        """
        if plan.run.sweep.fresh:
            return self.alone(plan, started)
        if self._ranks is None or not self._ranks.fit(plan):
            self.close()
            self._ranks = self._ending.enter_context(processes(plan))
        try:
            return self._ranks.run(plan, started, keep=True)
        except BaseException:  # a failure breaks their process group
            self.close()
            raise

    def alone(self, plan: Plan, started: float) -> Result:
        """Carry out a plan in processes of its own, with all memory."""
        self.close()
        return launcher.launch(plan, started, fresh=True)

    def close(self) -> None:
        """Release the weights and end the processes."""
        self._ranks = None
        self._ending.close()
