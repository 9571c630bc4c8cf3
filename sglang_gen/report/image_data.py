"""Images for the page: scaled down, compared with their references, and encoded as data URIs.

All images of a page together have at most `PIXELS` pixels, and each at most `LONGEST` on its longer side. An image is
embedded as PNG where that takes at most `PNG_BYTES`, and as WebP of quality 90 otherwise. Difference maps are grey PNG
images with half of the pixels: the largest absolute difference of the three channels, computed at full size.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_gen import files
from sglang_gen.errors import InvalidValueError, in_our_words
from sglang_gen.perf import quality
from sglang_gen.report.gallery import Item, references

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

PIXELS, LONGEST, SHORTEST = 24_000_000, 512, 96
PNG_BYTES = 200_000
SSIM_PIXELS = 8_000_000  # SSIM takes about a second per million pixels; images with more in all have none
MEDIA_BYTES = 2_000_000  # a video or sound of more bytes is linked, not embedded
MOST_MEDIA_BYTES = 40_000_000  # all embedded videos and sounds together
FACTORS = (1, 2, 4, 8, 16, 32, 64)  # by which difference maps can be amplified


@dataclass(frozen=True)
class Embedded:
    """An item as it is shown. `data` and `difference` are data URIs; `problem` says why there is none."""

    item: Item
    data: str | None = None
    size: tuple[int, int] | None = None  # width and height of the file
    shown: tuple[int, int] | None = None  # of the embedded image
    difference: str | None = None
    is_reference: bool = False
    squared_error: float | None = None
    ssim: float | None = None
    strongest: int = 0  # 99th percentile of the difference map
    problem: str | None = None


def embed(found: Sequence[Item]) -> list[Embedded]:
    """All items, in order, with their images, videos and sounds."""
    images = sum(item.kind == "image" for item in found)
    longest = longest_side(images)
    reader, media = _References(found), 0
    shown = []
    for item, reference in zip(found, references(found), strict=True):
        if item.kind == "image":
            shown.append(_image(item, reference, longest, reader))
        elif item.path is not None and item.kind in ("video", "audio"):
            one = _media(item, item.path, MOST_MEDIA_BYTES - media)
            media += len(one.data or "")
            shown.append(one)
        else:
            shown.append(Embedded(item))
    return shown


def longest_side(images: int) -> int:
    """The longest side of an embedded image, in pixels, if there are so many."""
    return max(SHORTEST, min(LONGEST, math.isqrt(PIXELS // max(images, 1))))


class _References:
    """Decoded references. Neighbouring images mostly share theirs, so only the last ones are kept."""

    def __init__(self, found: Sequence[Item]) -> None:
        self.kept: dict[Path, Pixels] = {}
        self.rates_ssim = sum(map(_area, found)) <= SSIM_PIXELS

    def read(self, path: Path) -> "Pixels":
        if path not in self.kept:
            if len(self.kept) >= 8:
                del self.kept[next(iter(self.kept))]
            self.kept[path] = _pixels(path)
        return self.kept[path]


def _area(item: Item) -> int:
    """Number of pixels of an image, read from its header; 0 if it cannot be read."""
    if item.kind != "image" or item.path is None:
        return 0
    try:
        with files.opened_image(item.path) as image:
            return math.prod(image.size)
    except (OSError, InvalidValueError):
        return 0


def _pixels(path: Path) -> "Pixels":
    import numpy as np

    with files.opened_image(path) as image:
        return np.asarray(image.convert("RGB"))


def _image(item: Item, reference: Path | None, longest: int, reader: _References) -> Embedded:
    from PIL import Image

    assert item.path is not None
    try:
        pixels = _pixels(item.path)
    except (OSError, InvalidValueError) as error:
        return Embedded(item, problem=f"{item.path.name} cannot be read: {in_our_words(error)}")
    size = (pixels.shape[1], pixels.shape[0])
    picture = Image.fromarray(pixels)
    scaled = _scaled(picture, longest)
    shown = Embedded(item, data=_encoded(scaled), size=size, shown=scaled.size)
    if reference is None:
        return shown
    if reference == item.path:
        return replace(shown, is_reference=True)
    try:
        return _compared(shown, pixels, reader.read(reference), longest, reader)
    except (OSError, InvalidValueError, ValueError) as error:
        words = in_our_words(error)
        return replace(shown, problem=f"{item.path.name} cannot be compared with {reference}: {words}")


def _compared(shown: Embedded, pixels: "Pixels", other: "Pixels", longest: int, reader: _References) -> Embedded:
    import numpy as np
    from PIL import Image

    if pixels.shape != other.shape:
        raise InvalidValueError("they have different sizes")
    rates_ssim = reader.rates_ssim and min(pixels.shape[:2]) >= quality.WINDOW
    differences = np.abs(pixels.astype(np.int16) - other).max(axis=2).astype(np.uint8)
    grey = _scaled(Image.fromarray(differences), round(longest / math.sqrt(2)))
    return replace(
        shown,
        difference=_uri(_png(grey), "png"),
        squared_error=quality.squared_error(pixels, other),
        ssim=quality.ssim(pixels, other) if rates_ssim else None,
        strongest=int(np.percentile(np.asarray(grey), 99)),
    )


def amplification(shown: Sequence[Embedded]) -> int:
    """The factor by which difference maps are amplified at first: it makes the median map use the range of greys."""
    strongest = sorted(one.strongest for one in shown if one.difference is not None and one.strongest)
    if not strongest:
        return 1
    return max(factor for factor in FACTORS if factor == 1 or factor * strongest[len(strongest) // 2] <= 255)


def _scaled(image: "Image.Image", longest: int) -> "Image.Image":
    """The image with at most `longest` pixels on its longer side; a smaller one is unchanged."""
    if max(image.size) <= longest:
        return image
    from PIL import Image

    factor = longest / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BOX)


def _encoded(image: "Image.Image") -> str:
    png = _png(image)
    if len(png) <= PNG_BYTES:
        return _uri(png, "png")
    buffer = io.BytesIO()
    image.save(buffer, format="webp", quality=90)
    return _uri(buffer.getvalue(), "webp")


def _png(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _uri(data: bytes, kind: str, family: str = "image") -> str:
    return f"data:{family}/{kind};base64,{base64.b64encode(data).decode()}"


def _media(item: Item, path: Path, room: int) -> Embedded:
    """A video or sound, if it is small enough for the page."""
    try:
        size = path.stat().st_size
        if size > min(MEDIA_BYTES, room):
            return Embedded(item, problem=f"{path.name} has {size / 1e6:.1f} MB and is linked, not embedded")
        data = path.read_bytes()
    except OSError as error:
        return Embedded(item, problem=f"{path.name} cannot be read: {in_our_words(error)}")
    return Embedded(
        item, data=_uri(data, {"wav": "wav", "mp3": "mpeg"}.get(path.suffix[1:], path.suffix[1:]), item.kind)
    )
