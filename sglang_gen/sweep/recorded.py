"""Records the results of a multirun's jobs in its launcher, independently of Hydra's sweeper."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Recorder:
    """Wraps a Hydra launcher and appends its `JobReturn`s to `ended`.

    Failed jobs are reported to the sweeper only if `failures` is set, because Hydra's own sweeper would end the sweep.
    """

    def __init__(self, launcher: Any, ended: list[Any], failures: bool) -> None:
        self.launcher, self.ended, self.failures = launcher, ended, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        jobs = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        self.ended += jobs
        return [self._reported(job) if job.status.name == "FAILED" else job for job in jobs]

    def _reported(self, job: Any) -> Any:
        if self.failures:
            return _Failed(job)
        return dataclasses.replace(job, status=type(job.status).COMPLETED, _return_value=None)


class _Failed:
    """A failed job whose `return_value` raises the error without printing to standard error, unlike Hydra's."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)

    @property
    def return_value(self) -> Any:
        raise self.job._return_value


@contextmanager
def recorded(plugins: Any, ended: list[Any], failures: bool) -> Iterator[None]:
    """Context in which every launcher that Hydra's `plugins` instantiates is wrapped in a `Recorder`."""
    make: Callable[..., Any] = plugins.instantiate_launcher
    plugins.instantiate_launcher = lambda *args, **kwargs: Recorder(make(*args, **kwargs), ended, failures)
    try:
        yield
    finally:
        del plugins.instantiate_launcher
