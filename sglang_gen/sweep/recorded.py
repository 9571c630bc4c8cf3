"""Notes which jobs of a multirun have ended and how, whatever Hydra's sweeper does with them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Recorder:
    """A launcher of Hydra whose ended jobs, its `JobReturn`s, are noted in `ended`.

    A sweeper learns that a job has failed only where `failures` is set: Hydra's own would end the sweep.
    """

    def __init__(self, launcher: Any, ended: list[Any], failures: bool) -> None:
        self.launcher, self.ended, self.failures = launcher, ended, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        jobs = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        self.ended += jobs
        return [self._seen(job) if job.status.name == "FAILED" else job for job in jobs]

    def _seen(self, job: Any) -> Any:
        if self.failures:
            return _Failed(job)
        return dataclasses.replace(job, status=type(job.status).COMPLETED, _return_value=None)


class _Failed:
    """A failed job, whose `return_value` raises without Hydra's own lines on standard error."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)

    @property
    def return_value(self) -> Any:
        raise self.job._return_value


@contextmanager
def recorded(plugins: Any, ended: list[Any], failures: bool) -> Iterator[None]:
    """Inside, every launcher that a sweeper makes of Hydra's `plugins` is a recorder."""
    make: Callable[..., Any] = plugins.instantiate_launcher
    plugins.instantiate_launcher = lambda *args, **kwargs: Recorder(make(*args, **kwargs), ended, failures)
    try:
        yield
    finally:
        del plugins.instantiate_launcher
