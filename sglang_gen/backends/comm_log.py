"""Collectives that a rank ran in the timed generation by stage, and the facts from which its traffic is predicted."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_gen.engine.cfg import Guidance, kinds
from sglang_gen.families.contract import Request
from sglang_gen.parallel.collectives import Traffic, counted

Described = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor


def described(tensor: torch.Tensor) -> Described:
    return tuple(tensor.shape), tensor.dtype


@dataclass(frozen=True)
class GeneratedBatch:
    """How one batch was generated, as far as its communication depends on it.

    `steps` is the step of each evaluation and `networks` the name of the network that computes it, `texts` the encoded
    texts of each guidance branch, and `encoded` the number of lists of texts that the text encoders encoded. `choices`
    are those of the step cache in each evaluation, if there is one.
    """

    request: Request
    guidance: Guidance
    steps: tuple[int, ...]
    networks: tuple[str, ...]
    texts: tuple[tuple[Described, ...], ...]
    encoded: int
    latents: Described
    choices: tuple[tuple[Hashable, ...], ...] = ()

    @property
    def kinds(self) -> list[int]:
        """For each evaluation the index of the first one of its kind, of which a step cache left out the same."""
        plain = kinds(self.guidance, self.steps, self.networks)
        found: list[Any] = list(zip(plain, self.choices, strict=True)) if self.choices else list(plain)
        return [found.index(kind) for kind in found]


class CommLog:
    """Measured traffic by stage and the generated batches, recorded while `on` is True (in the timed generation)."""

    def __init__(self) -> None:
        self.on = False
        self.traffic: dict[str, Traffic] = {}
        self.evaluations: dict[str, int] = {}  # stage -> number of evaluations of its network
        self.batches: Counter[GeneratedBatch] = Counter()

    @contextmanager
    def during(self, stage: str, evaluations: int | None = None) -> Iterator[None]:
        """Record the traffic of the block under `stage`; `evaluations` of the stage's network run in it, if known."""
        with counted() as traffic:
            yield
        if not self.on:
            return
        self.traffic.setdefault(stage, Traffic()).include(traffic)
        if evaluations is not None:
            self.evaluations[stage] = self.evaluations.get(stage, 0) + evaluations

    def note(self, batch: GeneratedBatch) -> None:
        if self.on:
            self.batches[batch] += 1

    def report(self, predicted: Mapping[str, Traffic]) -> dict[str, Any]:
        """`{stage: {evaluations, collectives: {name: {count, bytes, predicted_count, predicted_bytes}}}}`.

        Stages that are not in `predicted` have no predictions; the number of evaluations is None if it is unknown.
        """
        return {
            stage: {
                "evaluations": self.evaluations.get(stage),
                "collectives": _compared(measured, predicted.get(stage)),
            }
            for stage, measured in self.traffic.items()
            if measured.calls or (stage in predicted and predicted[stage].calls)
        }


def _compared(measured: Traffic, predicted: Traffic | None) -> dict[str, dict[str, int]]:
    if predicted is None:
        return {name: {"count": count, "bytes": measured.bytes[name]} for name, count in measured.calls.items()}
    return {
        name: {
            "count": measured.calls.get(name, 0),
            "bytes": measured.bytes.get(name, 0),
            "predicted_count": predicted.calls.get(name, 0),
            "predicted_bytes": predicted.bytes.get(name, 0),
        }
        for name in sorted({*measured.calls, *predicted.calls})
    }
