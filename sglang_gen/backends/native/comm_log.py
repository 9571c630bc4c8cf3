"""What a rank sent in the timed generation, beside what the rehearsal of its layout said that it would."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_gen.parallel.collectives import Traffic, counted


class Sent:
    """Traffic by stage. Nothing is noted while `on` is false, which is before the timed generation."""

    def __init__(self) -> None:
        self.on = False
        self.times: dict[str, int] = {}  # how often each stage was entered, in evaluations of its network
        self.measured: dict[str, Traffic] = {}
        self.predicted: dict[str, Traffic] = {}

    @contextmanager
    def during(self, stage: str, predicted: list[Traffic] | None) -> Iterator[None]:
        """Count what is sent inside; `predicted` is what each evaluation is expected to send, if that is known."""
        with counted() as traffic:
            yield
        if not self.on:
            return
        _add(self.measured.setdefault(stage, Traffic()), traffic)
        if predicted is None:
            return
        self.times[stage] = self.times.get(stage, 0) + len(predicted)
        for each in predicted:
            _add(self.predicted.setdefault(stage, Traffic()), each)

    def report(self) -> dict[str, Any]:
        """`{stage: {evaluations, collectives: {name: {count, bytes, predicted_count, predicted_bytes}}}}`.

        Predictions and the number of evaluations are absent where nothing was rehearsed.
        """
        return {
            stage: {"evaluations": self.times.get(stage), "collectives": self._collectives(stage)}
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
