"""The cells of one or more sweeps: each job with its values of the swept keys, its label and its observations."""

import os.path
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_gen import log
from sglang_gen.errors import UserError
from sglang_gen.report.job_reader import Row, read_jobs

SWEEP = "sweep"  # the key that tells the cells of several sweeps apart
UNSET = "not set"  # the value of a key that the overrides of a cell do not set
JOIN = "\N{NO-BREAK SPACE}\N{MIDDLE DOT}\N{NO-BREAK SPACE}"  # keeps a short name on one line
LONGEST_VALUE = 60  # characters of a value in a label


@dataclass(frozen=True)
class Cell:
    """One job. `values` has the value of every swept key, `label` names the cell in plots and sentences."""

    folder: Path  # of the sweep
    row: Row
    values: Mapping[str, str]
    label: str  # cache=none, seed=1
    short: str  # none · 1, the name of the cell in sentences and plots
    seconds: tuple[float, ...] = ()  # one observation per repeat: generation of one image, without saving

    @property
    def has_random_weights(self) -> bool:
        """Whether the run drew its weights (model.weights=random): its images mean nothing."""
        return self.row.effective.get("model.weights") == "random"


def read_cells(folders: Sequence[Path]) -> list[Cell]:
    """The cells of the sweeps in `folders`, in the order of folders and jobs. Raises UserError if there is no job."""
    found: list[tuple[Path, Row]] = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"The folder {folder} does not exist; give the folder of a sweep")
        rows = read_jobs(folder)
        if not rows:
            raise UserError(f"The folder {folder} holds no job of a sweep (a folder 0 with the file job.json)")
        found += [(folder, row) for row in rows]
    names = _sweep_names(folders)
    settings = [_settings(row.overrides) | names.get(folder, {}) for folder, row in found]
    keys = _swept(settings)
    short = short_names(keys)
    cells = []
    for (folder, row), setting in zip(found, settings, strict=True):
        values = {key: log.visible(log.shorten(setting.get(key, UNSET), LONGEST_VALUE)) for key in keys}
        words = [values[key] if key == SWEEP else f"{short[key]}={values[key]}" for key in keys if values[key] != UNSET]
        label = ", ".join(words) or f"job {row.job}"
        short_label = JOIN.join(values.values()) if len(values) > 1 else label
        if row.label:
            label = short_label = log.visible(log.shorten(row.label, LONGEST_VALUE))
        cells.append(Cell(folder, row, values, label, short_label, tuple(_seconds(row))))
    return _told_apart(cells)


def _sweep_names(folders: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """The value of the key `sweep`: the folder's name, or its path if two folders have the same name."""
    if len(folders) < 2:
        return {}
    unique = len({folder.name for folder in folders}) == len(folders)
    return {folder: {SWEEP: folder.name if unique else str(folder)} for folder in folders}


def _settings(overrides: Sequence[str]) -> dict[str, str]:
    """`("cache=none", "+perf.tag=a")` -> `{"cache": "none", "perf.tag": "a"}`; `~key` removes a key."""
    settings = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        settings[key.lstrip("+~")] = value if equals else "removed"
    return settings


def _swept(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys with several values. Cells without overrides, such as one whose note is missing, do not count."""
    known = [each for each in settings if each.keys() - {SWEEP}] or settings
    keys = dict.fromkeys(key for each in settings for key in each)
    swept = [key for key in keys if len({each.get(key) for each in known}) > 1]
    return sorted(swept, key=lambda key: key != SWEEP)  # stable: the sweep first, then the order of the command line


def without_middle(text: str, length: int) -> str:
    """At most `length` characters of a text, from both of its ends: names of cells often differ in the last ones."""
    front = (length - 3) // 2
    return text if len(text) <= length else f"{text[:front]}...{text[len(text) - (length - 3 - front) :]}"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole key if two keys end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: log.visible(end if ends.count(end) == 1 else key) for key, end in zip(keys, ends, strict=True)}


def _seconds(row: Row) -> Iterator[float]:
    """Seconds per image of each repeat. Saving is left out, because only the first repeat saves its images."""
    images = max(len(row.dump.get("samples") or ()), 1)
    for repeat in row.dump.get("repeats") or [row.dump]:
        saving = sum(stage["duration_ms"] for stage in repeat.get("steps", ()) if stage["name"] == "saving")
        total = repeat.get("total_duration_ms", 0.0) - saving
        if total > 0:
            yield total / images / 1000


def _told_apart(cells: list[Cell]) -> list[Cell]:
    """The cells with the job's number in each label that two cells share."""
    labels = Counter(cell.label for cell in cells)

    def told_apart(cell: Cell) -> Cell:
        job = f" (job {cell.row.job})"
        return cell if labels[cell.label] == 1 else replace(cell, label=cell.label + job, short=cell.short + job)

    return [told_apart(cell) for cell in cells]
