"""Settings of a sweep's jobs as its table shows them: the swept keys, and requested values that did not take effect."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

from sglang_gen.report.job_reader import Row
from sglang_gen.sweep.columns import Column

_GROUPS = {"quant": "quantization"}  # config group -> setting of a dump, where the names differ
KEYS_RANK = 11  # of the first swept key's column; later keys are left out before it


@dataclass
class Swept:
    """Columns of the swept keys, and the keys and settings of a dump whose values they show."""

    columns: list[Column] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)


def swept_cells(rows: Sequence[Row], shared: Sequence[str]) -> Swept:
    """One column for each key whose override not all jobs share, as `requested → effective` where these differ."""
    words = [dict(map(_key_and_value, (word for word in row.overrides if word not in shared))) for row in rows]
    keys = list(dict.fromkeys(key for own in words for key in own))
    swept = Swept()
    for number, key in enumerate(keys):
        setting = _setting_of(key, rows, words)
        swept.shown += [name for name in (setting, key) if name]
        cells = [_cell(key, setting, row, own.get(key)) for row, own in zip(rows, words, strict=True)]
        swept.columns.append(Column(_header(key, keys), cells, KEYS_RANK + 10 * number / len(keys), is_text=True))
    return swept


def _key_and_value(word: str) -> tuple[str, str]:
    """Key and value of an override. A deletion (`~key`) has its sign as the value."""
    key, equals, value = word.partition("=")
    return key.lstrip("+~"), value if equals else "~"


def _header(key: str, keys: Sequence[str]) -> str:
    """The last part of a key if no other swept key has the same."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _setting_of(key: str, rows: Sequence[Row], words: Sequence[dict[str, str]]) -> str | None:
    """The setting of a dump whose requested value is the value of the key in each job that has both."""
    group = key.partition(".")[0]
    for name in dict.fromkeys(name for row in rows for name in row.requested):
        if name.partition(".")[0] != _GROUPS.get(group, group):
            continue
        pairs = [(own[key], row.requested.get(name)) for row, own in zip(rows, words, strict=True) if key in own]
        if any(None not in pair for pair in pairs) and all(pair[1] in (None, pair[0]) for pair in pairs):
            return name
    return None


def _cell(key: str, setting: str | None, row: Row, value: str | None) -> str:
    if value is None:
        return ""
    if key == "parallel":
        effective, requested = layout(row), value.replace("_", " ")
    else:
        effective, requested = row.effective.get(setting or ""), value
    return value if effective in (None, requested) else f"{value} → {effective}"


def layout(row: Row) -> str | None:
    """The degrees in effect that are greater than 1, such as `ring2 tp2`; `single` if there are none."""
    degrees = {name: degree for name, degree in row.effective.items() if name.startswith("parallel.")}
    if not degrees:
        return None
    words = [f"{name.removeprefix('parallel.')}{degree}" for name, degree in degrees.items() if degree != "1"]
    return " ".join(words) or "single"


def changes(rows: Sequence[Row], shown: Set[str]) -> Iterator[tuple[str, list[tuple[Row, str]], int]]:
    """Each setting with its change in the jobs in which it has one, and the number of jobs that have the setting."""
    for name in dict.fromkeys(name for row in rows for name in row.requested):
        having = [row for row in rows if name in row.requested and name in row.effective]
        changed = [
            (row, f"{row.requested[name]} → {row.effective[name]}")
            for row in having
            if row.requested[name] != row.effective[name]
        ]
        if changed and name not in shown:
            yield name, changed, len(having)
