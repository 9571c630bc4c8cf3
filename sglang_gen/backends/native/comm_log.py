"""Collectives that a rank ran in the timed generation, next to those predicted by tracing its layout on meta."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_gen.parallel.collectives import Traffic, counted


class CommLog:
    """Measured and predicted traffic by stage, recorded while `on` is True (in the timed generation)."""

    def __init__(self) -> None:
        self.on = False
        self.evaluations: dict[str, int] = {}  # stage -> number of evaluations of its network
        self.measured: dict[str, Traffic] = {}
        self.predicted: dict[str, Traffic] = {}

    @contextmanager
    def during(self, stage: str, predicted: list[Traffic] | None) -> Iterator[None]:
        """Record the traffic of the block under `stage`; `predicted` has the traffic of each evaluation, if known."""
        with counted() as traffic:
            yield
        if not self.on:
            return
        _add(self.measured.setdefault(stage, Traffic()), traffic)
        if predicted is None:
            return
        self.evaluations[stage] = self.evaluations.get(stage, 0) + len(predicted)
        for evaluation in predicted:
            _add(self.predicted.setdefault(stage, Traffic()), evaluation)

    def report(self) -> dict[str, Any]:
        """`{stage: {evaluations, collectives: {name: {count, bytes, predicted_count, predicted_bytes}}}}`.

        Stages that were not traced on meta have no predictions, and None for the number of evaluations.
        """
        return {
            stage: {"evaluations": self.evaluations.get(stage), "collectives": self._collectives(stage)}
            for stage in self.measured
            if self.measured[stage].calls or self.predicted.get(stage, Traffic()).calls
        }

    def _collectives(self, stage: str) -> dict[str, Any]:
        measured = self.measured[stage]
        if stage not in self.predicted:
            return {name: {"count": count, "bytes": measured.bytes[name]} for name, count in measured.calls.items()}
        predicted = self.predicted[stage]
        return {
            name: {
                "count": measured.calls.get(name, 0),
                "bytes": measured.bytes.get(name, 0),
                "predicted_count": predicted.calls.get(name, 0),
                "predicted_bytes": predicted.bytes.get(name, 0),
            }
            for name in sorted({*measured.calls, *predicted.calls})
        }


def _add(total: Traffic, more: Traffic) -> None:
    for name, count in more.calls.items():
        total.calls[name] = total.calls.get(name, 0) + count
        total.bytes[name] = total.bytes.get(name, 0) + more.bytes[name]
