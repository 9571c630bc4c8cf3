"""The generated files of all cells, and the reference of each image: the counterpart with the same prompt and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_gen import log
from sglang_gen.report.cells import UNSET, Cell

SAMPLE = "image"  # the key that tells several files of one cell apart
MEDIA_KINDS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif"),
    "video": (".mp4", ".webm"),
    "audio": (".wav", ".flac", ".mp3", ".ogg"),
}


@dataclass(frozen=True)
class Item:
    """One generated file, or a cell that generated none, which has no path."""

    cell: Cell
    values: Mapping[str, str]  # those of the cell, and of SAMPLE if any cell has several files
    path: Path | None = None
    kind: str = "none"
    sample: Mapping[str, Any] | None = None  # the entry of the perf dump, with prompt and seed
    stated: Path | None = None  # the image of quality.reference that the run was compared with


def items(cells: Sequence[Cell]) -> list[Item]:
    """All files of all cells, in order; one item without a path for a cell without files."""
    outputs = [[name for name in cell.row.outputs if ".." not in Path(name).parts] for cell in cells]
    several = any(len(own) > 1 for own in outputs)
    names = _sample_names(cells, max(map(len, outputs))) if several else {}
    found = []
    for cell, own in zip(cells, outputs, strict=True):
        if not own:
            found.append(Item(cell, {**cell.values, **({SAMPLE: UNSET} if several else {})}))
        for index, output in enumerate(own):
            path, values = cell.folder / output, cell.values
            if several:
                values = {**values, SAMPLE: names[index]}
            sample = next((one for one in cell.row.dump.get("samples") or () if one.get("file") == path.name), None)
            found.append(Item(cell, values, path, _kind(path), sample, _stated(cell, path.name)))
    return found


def _kind(path: Path) -> str:
    return next((kind for kind, endings in MEDIA_KINDS.items() if path.suffix.lower() in endings), "none")


def _sample_names(cells: Sequence[Cell], most: int) -> dict[int, str]:
    """The number of each file in its cell, with its seed and prompt where all cells agree on them."""
    columns: dict[int, list[Mapping[str, Any]]] = {}
    for cell in cells:
        for index, sample in enumerate(cell.row.dump.get("samples") or ()):
            columns.setdefault(index, []).append(sample)
    prompts = {str(sample.get("prompt")) for column in columns.values() for sample in column}
    names = {}
    for index in range(most):
        column = columns.get(index, [])
        words = [str(index)]
        if len(seeds := {sample.get("seed") for sample in column}) == 1:
            words.append(f"seed {seeds.pop()}")
        if len(prompts) > 1 and len(own := {str(sample.get("prompt")) for sample in column}) == 1:
            words.append(log.visible(log.shorten(own.pop(), 40)))
        names[index] = ", ".join(words)
    return names


def _stated(cell: Cell, name: str) -> Path | None:
    """The reference image that the perf dump names for the file `name`."""
    quality = cell.row.dump.get("quality") or {}
    for entry in quality.get("samples") or ():
        reference = str(entry.get("reference", ""))
        if entry.get("file") == name and reference and Path(reference).name == reference:
            return Path(str(quality.get("reference"))) / reference
    return None


def references(found: Sequence[Item]) -> list[Path | None]:
    """For each item, the image it is compared with: that of quality.reference, or else the first one in the sweep.

    The first image of a completed cell with the same prompt, negative prompt and seed. It is its own reference.
    """
    first: dict[tuple[Any, ...], Path] = {}
    chosen: list[Path | None] = []
    for item in found:
        if item.stated is not None:
            chosen.append(item.stated)
        elif item.kind != "image" or item.sample is None or item.path is None:
            chosen.append(None)
        else:
            size = tuple(item.cell.row.effective.get(side) for side in ("width", "height"))
            key = (*(str(item.sample.get(name)) for name in ("prompt", "negative_prompt", "seed")), *size)
            chosen.append(first.setdefault(key, item.path))
    return chosen
