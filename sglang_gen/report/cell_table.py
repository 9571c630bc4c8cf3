"""The table of a report: one line per cell, measurements first, then the settings that differ between cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sglang_gen import log
from sglang_gen.perf.attributes import percent
from sglang_gen.perf.dump_numbers import Measure
from sglang_gen.perf.statistics import geometric_mean
from sglang_gen.report.cell_metrics import MEMORY_NAMES, Metrics, memory_column
from sglang_gen.report.cells import SWEEP, short_names
from sglang_gen.report.conclusion import duration
from sglang_gen.report.setting_pairs import Setting


@dataclass(frozen=True)
class Entry:
    """One field of the table: its text, the number by which its column is sorted, and the interval below it."""

    text: str = ""
    number: float | None = None
    interval: str = ""
    setting: Setting | None = None


@dataclass(frozen=True)
class Line:
    """One cell. `reason` says why it has no measurements."""

    keys: list[Entry]
    entries: list[Entry]
    status: str
    reason: str | None


@dataclass(frozen=True)
class Table:
    keys: list[str]  # headers of the swept keys
    header: list[str]
    lines: list[Line]
    shows_status: bool  # whether any cell did not complete


def table(found: Sequence[Metrics], own: dict[str, list[Setting]]) -> Table:
    """The table of the cells in `found`; `own` are the settings that differ, from `shared_and_own`."""
    swept = list(found[0].cell.values)
    names = short_names(swept)
    first = next((one for one in found if one.cell.seconds), None)
    memory = memory_column([one.cell for one in found])
    columns: dict[str, list[Entry]] = {
        "time per image": [_time(one.time) for one in found],
        "speed-up": [_speed_up(first, one) for one in found],
        "step, median": [_time(one.cell.row.times.get("step")) for one in found],
        "step, mean": [_mean_step(one) for one in found],
        f"peak {MEMORY_NAMES[memory]}" if memory else "memory": [_number(one.memory, "{:.0f} MiB") for one in found],
        "PSNR": [_psnr(one) for one in found],
        "SSIM": [_number(one.ssim, "{:.4f}") for one in found],
        "attributes": [_attributes(one) for one in found],
        "whole job": [_number(one.cell.row.seconds, "{:.1f} s") for one in found],
    }
    if not any(one.cell.row.dump.get("cache") for one in found):
        del columns["step, mean"]
    columns = {name: column for name, column in columns.items() if any(entry.text for entry in column)}
    for name, settings in own.items():
        if name not in swept or any(setting.changed for setting in settings):
            columns[log.visible(name)] = [Entry(setting.value, setting=setting) for setting in settings]
    lines = [
        Line(
            keys=[Entry(one.cell.values[key], _as_number(one.cell.values[key])) for key in swept],
            entries=[column[index] for column in columns.values()],
            status=one.cell.row.status,
            reason=None if not one.cell.row.error else log.visible(one.cell.row.error),
        )
        for index, one in enumerate(found)
    ]
    return Table(
        [names[key] if key != SWEEP else SWEEP for key in swept],
        list(columns),
        lines,
        any(line.status != "completed" for line in lines),
    )


def _time(item: Measure | None) -> Entry:
    if item is None:
        return Entry()
    text, _, interval = duration(item.median, item.low, item.high).partition(" (")
    return Entry(text, item.median, interval.rstrip(")"))


def _speed_up(first: Metrics | None, one: Metrics) -> Entry:
    """How many times as fast as the first measured cell, by geometric means."""
    if first is None or not one.cell.seconds:
        return Entry()
    ratio = geometric_mean(first.cell.seconds) / geometric_mean(one.cell.seconds)
    return Entry(f"{ratio:.2f} x", ratio)


def _mean_step(one: Metrics) -> Entry:
    """The mean over all steps, which unlike the median counts the steps that a cache computes."""
    repeats: list[dict[str, Any]] = one.cell.row.dump.get("repeats") or [dict(one.cell.row.dump)]
    steps = [step["duration_ms"] for repeat in repeats for step in repeat.get("denoise_steps_ms", ())]
    return Entry(duration(fmean(steps) / 1000), fmean(steps)) if steps else Entry()


def _psnr(one: Metrics) -> Entry:
    if one.is_reference:
        return Entry("reference", math.inf)
    if one.psnr is not None and math.isinf(one.psnr):
        return Entry("identical", math.inf)
    return _number(one.psnr, "{:.2f} dB")


def _attributes(one: Metrics) -> Entry:
    """The attribute accuracy, and below it that of the reference's images."""
    if one.attributes is None:
        return Entry()
    other = "" if one.reference_attributes is None else f"reference {percent(one.reference_attributes)}"
    return Entry(percent(one.attributes), one.attributes, other)


def _number(value: float | None, form: str) -> Entry:
    return Entry() if value is None else Entry(form.format(value), value)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
