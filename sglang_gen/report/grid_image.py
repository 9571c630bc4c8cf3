"""The labelled grid of images alone, as a PNG for a paper or a chat."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_gen import files
from sglang_gen.errors import InvalidValueError
from sglang_gen.report.cells import UNSET, short_names, without_middle
from sglang_gen.report.image_data import Embedded
from sglang_gen.report.page import MARK, axes

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

LARGEST_TILE, SMALLEST_TILE, GAP, MARGIN, LETTERS = 256, 96, 10, 20, 15  # pixels
MOST_PIXELS = 40_000_000  # of all tiles
WIDEST_TITLE = 640  # pixels
PAPER, INK, FAINT = "#ffffff", "#1b1d20", "#e4e6e9"


@dataclass(frozen=True)
class Layout:
    """Rows of tiles. `headings` stand above the columns; `titles` above the rows, or `captions` above each tile."""

    rows: list[list[Embedded | None]]
    headings: list[str]
    titles: list[str]
    captions: bool = False


def grid_png(shown: Sequence[Embedded]) -> bytes | None:
    """The grid with the columns of the page, and one row per combination of the other keys; None without an image."""
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    sizes = [one.size for one in shown if one.size is not None and one.data is not None]
    if not sizes:
        return None
    layout = arranged(shown)
    width, height = _tile(sizes, sum(map(len, layout.rows)))
    font = ImageFont.load_default(LETTERS)
    line = round(1.5 * LETTERS)
    above = line if layout.captions or any(layout.titles) else 0
    columns = max(map(len, layout.rows))
    top = MARGIN + (line if layout.headings else 0)
    canvas = Image.new(
        "RGB",
        (
            max(2 * MARGIN + columns * (width + GAP) - GAP, _longest(layout.titles, font)),
            top + len(layout.rows) * (above + height + GAP) + MARGIN - GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    for index, heading in enumerate(layout.headings):
        draw.text((MARGIN + index * (width + GAP), MARGIN), _fitted(draw, heading, width, font), INK, font)
    for row, tiles in enumerate(layout.rows):
        y = top + row * (above + height + GAP)
        if not layout.captions and layout.titles[row]:
            draw.text((MARGIN, y + 2), _fitted(draw, layout.titles[row], canvas.width - 2 * MARGIN, font), INK, font)
        for column, tile in enumerate(tiles):
            if tile is None:
                continue
            x = MARGIN + column * (width + GAP)
            if layout.captions:
                draw.text((x, y + 2), _fitted(draw, tile.item.cell.label, width, font), INK, font)
            _place(canvas, tile, (x, y + above, width, height), font)
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("Software", MARK)
    canvas.save(buffer, format="png", pnginfo=info)
    return buffer.getvalue()


def _longest(titles: Sequence[str], font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> int:
    """Width of a canvas on which the titles are legible, up to `WIDEST_TITLE`."""
    widths: list[int] = [math.ceil(font.getlength(title)) for title in titles]
    return 2 * MARGIN + min(WIDEST_TITLE, max(widths))


def arranged(shown: Sequence[Embedded]) -> Layout:
    """The rows and columns of the grid."""
    keys = list(dict.fromkeys(key for one in shown for key in one.item.values))
    values = {key: list(dict.fromkeys(one.item.values[key] for one in shown)) for key in keys}
    _, column = axes(values, len(shown))
    if column is None:
        wide = math.ceil(math.sqrt(1.5 * len(shown)))
        rows = [list(shown[start : start + wide]) for start in range(0, len(shown), wide)]
        return Layout([[*row] for row in rows], [], [""] * len(rows), captions=True)
    names = short_names(keys)
    places: dict[str, dict[str, Embedded]] = {}
    for one in shown:
        words = [
            f"{names[key]}={one.item.values[key]}" for key in keys if key != column and one.item.values[key] != UNSET
        ]
        places.setdefault(", ".join(words), {}).setdefault(one.item.values[column], one)
    return Layout(
        [[row.get(value) for value in values[column]] for row in places.values()],
        [f"{names[column]}={value}" for value in values[column]],
        list(places),
    )


def _tile(sizes: Sequence[tuple[int, int]], count: int) -> tuple[int, int]:
    """Width and height of a tile: the proportions of the first image."""
    side = min(LARGEST_TILE, math.isqrt(MOST_PIXELS // count), max(192, *(max(size) for size in sizes)))
    width, height = sizes[0]
    factor = max(side, SMALLEST_TILE) / max(width, height)
    return max(1, round(factor * width)), max(1, round(factor * height))


def _place(
    canvas: "Image.Image",
    tile: Embedded,
    box: tuple[int, int, int, int],
    font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
) -> None:
    """Draw one image into `box` (x, y, width, height), or the status of a cell that has none."""
    from PIL import Image, ImageDraw

    x, y, width, height = box
    try:
        if tile.data is None or tile.item.path is None or tile.item.kind != "image":
            raise InvalidValueError(tile.problem or tile.item.cell.row.status)
        with files.opened_image(tile.item.path) as image:
            picture = image.convert("RGB")
    except (OSError, InvalidValueError):
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=FAINT)
        draw.text((x + 8, y + 8), _fitted(draw, tile.item.cell.row.status, width - 16, font), INK, font)
        return
    factor = min(width / picture.width, height / picture.height)
    size = (max(1, round(factor * picture.width)), max(1, round(factor * picture.height)))
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, y))


def _fitted(
    draw: "ImageDraw.ImageDraw", text: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont"
) -> str:
    """The text, without its middle if it has more than `width` pixels."""
    lengths = range(len(text), 3, -1)
    return next((part for n in lengths if draw.textlength(part := without_middle(text, n), font) <= width), text[:1])
