"""The smallest budget whose images keep a PSNR, by bisection. Knows neither images nor how they are measured."""

from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_gen.tune.plan_schedule import PlannedSchedule, Planner

BUDGET_RESOLUTION = 0.01  # fraction of all blocks to which a budget is found


@dataclass(frozen=True)
class PlanMeasurement:
    """The images of a schedule against the exact ones, in dB, and its time in units of that of the exact run."""

    worst: float
    mean: float
    time: float
    worst_prompt: str = ""


@dataclass(frozen=True)
class PlanTrial:
    budget: int
    schedule: PlannedSchedule
    measured: PlanMeasurement


@dataclass
class PlanSearch:
    """The schedules of a planner that were measured, each once."""

    planner: Planner
    measure: Callable[[PlannedSchedule], PlanMeasurement]
    trials: list[PlanTrial] = field(default_factory=list)

    def try_budget(self, budget: int) -> PlanTrial:
        schedule = self.planner.schedule(budget)
        known = next((trial for trial in self.trials if trial.schedule.depths == schedule.depths), None)
        if known is None:
            known = PlanTrial(budget, schedule, self.measure(schedule))
            self.trials.append(known)
        return known

    def bisect(self, psnr: float) -> PlanTrial | None:
        """The trial with the fewest blocks whose worst image keeps `psnr`; None if only the exact run does.

        Between two budgets of which the larger keeps it and the smaller does not, the search halves the interval.
        """
        least, most = self.planner.least, self.planner.most
        found = self.try_budget(least)
        if found.measured.worst >= psnr:
            return found
        kept, failed, step = None, least, max(round(BUDGET_RESOLUTION * most), 1)
        high = most  # the exact run, which need not be measured
        while high - failed > step:
            trial = self.try_budget((high + failed) // 2)
            if trial.measured.worst >= psnr:
                kept, high = trial, min(trial.schedule.blocks, (high + failed) // 2)
            else:
                failed = (high + failed) // 2
        return kept
