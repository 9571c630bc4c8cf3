"""Requested settings beside the effective ones: those that all cells share, and those that differ between cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_gen import log
from sglang_gen.report.cells import Cell
from sglang_gen.report.job_reader import Row


@dataclass(frozen=True)
class Setting:
    """A setting of one cell. `changed` if a value was requested and another one took effect."""

    name: str
    requested: str | None
    effective: str | None

    @property
    def changed(self) -> bool:
        return None not in (self.requested, self.effective) and self.requested != self.effective

    @property
    def value(self) -> str:
        return self.effective or self.requested or ""


def _setting(row: Row, name: str) -> Setting:
    requested, effective = (
        None if value is None else log.visible(log.shorten(value, 200))
        for value in (row.requested.get(name), row.effective.get(name))
    )
    return Setting(log.visible(name), requested, effective)


def shared_and_own(cells: Sequence[Cell]) -> tuple[list[Setting], dict[str, list[Setting]]]:
    """Settings that are the same in all cells that ran, and by name those that differ, with one entry per cell.

    A cell whose setting `cache` is `none` has no settings `cache.X` and does not count for them.
    """
    rows = [cell.row for cell in cells]
    ran = [row for row in rows if row.requested or row.effective]
    names = dict.fromkeys(name for row in ran for name in (*row.requested, *row.effective))
    shared, own = [], {}
    for name in names:
        parents = [name[:place] for place, letter in enumerate(name) if letter == "."]
        having = [row for row in ran if not any(parent in row.effective for parent in parents)]
        values = {(row.requested.get(name), row.effective.get(name)) for row in having}
        if len(values) == 1:
            shared.append(_setting(having[0], name))
        elif values:
            own[name] = [_setting(row, name) for row in rows]
    return shared, own
