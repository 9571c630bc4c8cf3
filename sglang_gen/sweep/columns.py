"""Renders a Markdown table that fits a width: long texts are shortened in the middle, then columns are left out."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rich.cells import cell_len

from sglang_gen import log

# Texts keep this many terminal columns while columns of this rank or more can be left out instead.
KEPT_LENGTHS = ((75, 24), (41, 16), (0, 8))
SHORT_HEADER = 12  # a header is shortened to this, or to the cells below it, before any cell


@dataclass(frozen=True)
class Column:
    """One column, with its cells as plain text.

    The column with the highest `rank` is left out first, and one of rank 0 stays. `brief` are shorter cells, which
    replace the cells before columns of rank `brief_rank` or less are left out.
    """

    header: str
    cells: Sequence[str]
    rank: float = 0
    is_text: bool = False
    brief: Sequence[str] = ()
    brief_rank: int = 0

    @property
    def next_rank(self) -> float:
        return max(self.rank, self.brief_rank)

    @cached_property
    def natural_width(self) -> int:
        texts = (self.header, *self.cells)
        return max(3, *map(width, map(escaped, texts) if self.is_text else texts))


def width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    return len(text) if text.isascii() else cell_len(text)


def escaped(text: str) -> str:
    """Plain text for Markdown, on one line, without control characters."""
    return "".join(_pieces(text))


def shortened(text: str, limit: int) -> str:
    """`escaped` text without its middle, so that it takes at most `limit` columns."""
    return _cut(_pieces(text), limit)


def _cut(pieces: list[str], limit: int) -> str:
    widths = [width(piece) for piece in pieces]
    if sum(widths) <= limit:
        return "".join(pieces)
    start, end, free = 0, len(pieces), limit - 1
    while free >= (size := widths[start] if start <= len(pieces) - end else widths[end - 1]):
        start, end = (start + 1, end) if start <= len(pieces) - end else (start, end - 1)
        free -= size
    return "".join([*pieces[:start], "…", *pieces[end:]])


def _pieces(text: str) -> list[str]:
    """The characters of a text, each with its backslash if Markdown needs one."""
    return [re.sub(r"([\\`*\[\]<|])", r"\\\1", letter) for letter in log.visible(" ".join(text.split()))]


def wrapped(text: str, limit: int, indent: str = "") -> list[str]:
    """Lines of at most `limit` columns; lines after the first are indented, and a longer word loses its middle."""
    lines, line = list[str](), ""
    for word in text.split():
        if width(word) > limit - len(indent):
            word = _cut(re.findall(r"\\?.", word), limit - len(indent))
        joined = f"{line} {word}" if line.strip() else f"{line}{word}"
        if width(joined) > limit:
            lines.append(line)
            joined = f"{indent}{word}"
        line = joined
    return [*lines, line]


def fit(columns: Sequence[Column], limit: int) -> tuple[list[Column], list[str]]:
    """The columns that fit into `limit`, with escaped texts of the length that fits, and the headers of the others."""
    kept, left_out = list(columns), list[str]()
    if sum(3 + column.natural_width for column in kept) >= limit:
        kept = [_with_short_header(column) for column in kept]
    while True:
        step = max(kept, key=lambda column: column.next_rank)
        least = next(length for rank, length in KEPT_LENGTHS if step.next_rank >= rank)
        length = _text_length(kept, limit, least)
        if length is not None or not step.next_rank:
            return [_shorten(column, length or least) for column in kept], left_out
        place = kept.index(step)
        if step.brief_rank > step.rank:
            kept[place] = replace(step, cells=step.brief, brief_rank=0)
        else:
            left_out.append(kept.pop(place).header)


def _text_length(columns: Sequence[Column], limit: int, least: int) -> int | None:
    """The greatest length of texts with which the table fits, if that is `least` or more."""
    texts = sorted((column.natural_width for column in columns if column.is_text), reverse=True)
    free = limit - 1 - 3 * len(columns) - sum(column.natural_width for column in columns if not column.is_text)
    if sum(texts) <= free:
        return max(texts, default=least)
    for count in range(1, len(texts) + 1):  # the longest `count` texts share what the others leave
        length = (free - sum(texts[count:])) // count
        if length >= max([least, *texts[count : count + 1]]):
            return length
    return None


def _with_short_header(column: Column) -> Column:
    longest = max([SHORT_HEADER, *map(width, column.cells)])
    return replace(column, header=_cut(list(column.header), longest)) if column.is_text else column


def _shorten(column: Column, length: int) -> Column:
    """The column with escaped texts. Cells that differ only in their middle keep that in place of their ends."""
    if not column.is_text:
        return column
    cells = [shortened(cell, length) for cell in column.cells]
    if len(set(cells)) < len(set(column.cells)):
        cells = [shortened(cell, length) for cell in _without_shared_ends(column.cells)]
    return replace(column, header=shortened(column.header, length), cells=cells)


def _without_shared_ends(cells: Sequence[str]) -> list[str]:
    filled = [cell for cell in cells if cell]
    start = _common_length(filled)
    end = _common_length([cell[start:][::-1] for cell in filled])
    return [f"{'…' * (start > 0)}{cell[start : len(cell) - end]}{'…' * (end > 0)}" if cell else "" for cell in cells]


def _common_length(texts: Sequence[str]) -> int:
    letters = zip(*texts, strict=False)
    return next((place for place, of in enumerate(letters) if len(set(of)) > 1), min(map(len, texts)))


def render(columns: Sequence[Column]) -> list[str]:
    """Lines of the table, all of one width: texts to the left, numbers to the right."""
    widths = [max(3, *map(width, (column.header, *column.cells))) for column in columns]
    rows = [
        [column.header for column in columns],
        [f":{'-' * (size - 1)}" if column.is_text else f"{'-' * (size - 1)}:"
         for column, size in zip(columns, widths, strict=True)],
        *zip(*(column.cells for column in columns), strict=True),
    ]  # fmt: skip
    return [_line(row, columns, widths) for row in rows]


def _line(row: Iterable[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    cells = []
    for text, column, size in zip(row, columns, widths, strict=True):
        space = " " * (size - width(text))
        cells.append(text + space if column.is_text else space + text)
    return f"| {' | '.join(cells)} |"
