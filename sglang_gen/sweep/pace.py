"""Log lines about the pace of a sweep: what a finished job measured, and the time that is left."""

import os
from collections.abc import Mapping
from typing import Any

from sglang_gen.perf.dump_numbers import times


class Pace:
    """The durations of the jobs that ran in the command's process. Kept and refused jobs take no time and do not count.

    In the processes of a launcher, which run jobs at the same time, nothing is estimated.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.process = os.getpid()

    def left(self, number: int, total: int | None) -> str:
        """A clause about the time that the jobs after `number` will take; empty if that is not known."""
        remaining = 0 if total is None else total - number - 1
        if not self.seconds or remaining <= 0 or os.getpid() != self.process:
            return ""
        estimate = remaining * sum(self.seconds) / len(self.seconds)
        return f"; about {_duration(estimate)} left" if estimate >= 1 else ""


def _duration(seconds: float) -> str:
    """Seconds below a minute and a half, minutes below an hour and a half, then hours and minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def step_time(dump: Mapping[str, Any]) -> str:
    """The median denoising step of a dump, with its 95 % interval if it has repeats; empty without steps."""
    step = times(dump).get("step")
    if step is None:
        return ""
    median, interval = f"{1000 * step.median:.4g} ms a step", ""
    if step.low is not None and step.high is not None:
        interval = f" ({1000 * step.low:.4g} to {1000 * step.high:.4g})"
    return f": {median}{interval}"
