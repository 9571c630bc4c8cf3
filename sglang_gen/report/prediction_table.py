"""The table of predictions of a report: how much of each quantity was measured, divided by what was predicted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_gen import log
from sglang_gen.report.cells import Cell

# Entry of `predicted` in a dump -> header
PREDICTED_COLUMNS = {
    "memory_mb": "memory",
    "step_ms": "step",
    "total_ms": "encoding to decoding",
    "communication_bytes": "communication",
    "flops": "FLOPs",
}


@dataclass(frozen=True)
class PredictedLine:
    """One cell: its ratios as text, in the order of the columns."""

    label: str
    ratios: list[str]


@dataclass(frozen=True)
class PredictedTable:
    header: list[str]
    lines: list[PredictedLine]
    reasons: list[str]  # why there are cells without a ratio, a sentence each


def predicted_table(cells: Sequence[Cell]) -> PredictedTable | None:
    """The table of the cells whose dumps have predictions; None if there are none."""
    lines, reasons = [], dict[str, None]()
    for cell in cells:
        ranks = [*_predictions(cell.row.dump)]
        if not ranks:
            continue
        found = {name: _ratio(ranks, name) for name in PREDICTED_COLUMNS}
        for name, ratio in found.items():
            if ratio is None:
                reasons.update(dict.fromkeys(_reasons(ranks, name)))
        texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in found.values()]
        lines.append(PredictedLine(cell.label, texts))
    shown = [index for index in range(len(PREDICTED_COLUMNS)) if any(line.ratios[index] for line in lines)]
    if not shown:
        return None
    headers = [*PREDICTED_COLUMNS.values()]
    lines = [PredictedLine(line.label, [line.ratios[index] for index in shown]) for line in lines]
    return PredictedTable([headers[index] for index in shown], lines, [*reasons])


def _predictions(dump: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The predictions of each rank. Dumps of older versions have none."""
    for place in dump.get("ranks") or [dump]:
        predicted = place.get("predicted")
        if isinstance(predicted, Mapping):
            yield predicted


def _ratio(ranks: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The ratio of the rank whose measurement is farthest from its prediction."""
    ratios = [ratio for rank in ranks if (ratio := (rank.get(name) or {}).get("ratio"))]
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio), default=None)


def _reasons(ranks: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
    for rank in ranks:
        if reason := (rank.get(name) or {}).get("reason"):
            header = PREDICTED_COLUMNS[name]
            yield log.visible(f"{header[0].upper()}{header[1:]}: {reason}.")
