"""How far a picture is from its reference: PSNR, SSIM and the largest difference, on uint8 frames [H, W, 3]."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sglang_gen.errors import UserError
from sglang_gen.log import shorten

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Frame = np.ndarray[Any, np.dtype[np.uint8]]

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # the Gaussian window of SSIM, in pixels
K1, K2 = 0.01, 0.03


def squared_error(frame: "Frame", reference: "Frame") -> float:
    """Mean squared difference over all pixels and channels. Raises ValueError where the frames cannot be compared."""
    import numpy as np

    _check(frame, reference)
    return float(np.mean(np.square(frame.astype(np.float64) - reference)))


def psnr(frame: "Frame", reference: "Frame") -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared error); math.inf for identical frames."""
    return _decibels(squared_error(frame, reference))


def max_error(frame: "Frame", reference: "Frame") -> int:
    """The largest difference of any pixel in any channel, 0 to 255."""
    import numpy as np

    _check(frame, reference)
    return int(np.abs(frame.astype(np.int16) - reference).max())


def ssim(frame: "Frame", reference: "Frame") -> float:
    """Structural similarity, 1 for identical frames: the mean over the three channels, each on its own.

    Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE Transactions on Image Processing 13, 2004, equation 13 with its constants: Gaussian
    window of 11 x 11 pixels, sigma 1.5, sum 1, only where it lies inside the frame; K1 = 0.01, K2 = 0.03, L = 255. The
    paper judges luminance; channels are averaged here so that a change of colour alone is seen. Computed in float64.
    Raises ValueError for frames smaller than the window.
    """
    import numpy as np

    _check(frame, reference)
    if min(frame.shape[:2]) < WINDOW:
        height, width = frame.shape[:2]
        raise ValueError(f"SSIM needs at least {WINDOW} x {WINDOW} pixels, these frames have {width} x {height}")
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    x, y = np.moveaxis(frame, -1, 0).astype(np.float64), np.moveaxis(reference, -1, 0).astype(np.float64)  # [3, H, W]
    mean_x, mean_y = _blur(x), _blur(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = _blur(x * y) - product, _blur(x**2 + y**2) - squares
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return float(similarity.mean())


def _blur(planes: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Gaussian mean around every pixel whose window lies inside: [C, H, W] -> [C, H - 10, W - 10]."""
    weights = [math.exp(-((index - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for index in range(WINDOW)]
    weights = [weight / sum(weights) for weight in weights]
    height, width = (size - WINDOW + 1 for size in planes.shape[1:])
    rows = sum(weight * planes[:, shift : shift + height] for shift, weight in enumerate(weights))
    return sum(weight * rows[:, :, shift : shift + width] for shift, weight in enumerate(weights))  # type: ignore


def _check(frame: "Frame", reference: "Frame") -> None:
    for one in (frame, reference):
        if one.dtype.name != "uint8" or one.ndim != 3 or one.shape[2] != 3:
            raise ValueError(f"a frame is uint8 [H, W, 3], not {one.dtype} {list(one.shape)}")
    if frame.shape != reference.shape:
        raise ValueError(f"the frames have different sizes, {_size(frame)} and {_size(reference)}")


def _size(frame: "Frame") -> str:
    return f"{frame.shape[1]} x {frame.shape[0]}"


def _decibels(error: float) -> float:
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def counterparts(
    reference: str | Path, samples: Sequence[Mapping[str, Any]], size: tuple[int, int] | None = None
) -> list[Path]:
    """The picture in the folder `reference` that belongs to each sample: the one of the same prompt and seed.

    A sample has `prompt`, `seed` and possibly `negative_prompt`, which chooses where several pictures fit; `size` is
    the height and width that all will have, where that is known. To be called before a run: it then fails before work
    is done, and cannot find the run's own pictures. Raises UserError where one is missing, ambiguous, broken or of
    another size.
    """
    folder = Path(reference)
    records = _records(folder)
    found = [_counterpart(folder, records, sample) for sample in samples]
    for sample, path in zip(samples, found, strict=True):
        own = _size_of(path)
        if size is not None:
            _check_sizes(sample, size, path, own)
    return found


def compare(
    reference: str | Path,
    samples: Sequence[Mapping[str, Any]],
    frames: Sequence["Frame"],
    found: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """A finished run against the run records in the folder `reference`, ready for JSON.

    `samples[i]` describes `frames[i]`; `found` is what `counterparts` gave before the run. Gives `{reference, pairs,
    identical, psnr, ssim, max_error, samples}`: `psnr` is that of the mean squared error over all pairs (null where all
    are identical), `ssim` the mean, `max_error` the worst. Raises UserError where a counterpart is missing, ambiguous,
    broken or of another size.
    """
    if not samples:
        raise UserError("There is no picture to compare with a reference")
    paths = counterparts(reference, samples) if found is None else found
    pairs = [_pair(*item) for item in zip(samples, frames, paths, strict=True)]
    error = fmean(squared for squared, _ in pairs)
    compared = [entry for _, entry in pairs]
    return {
        "reference": str(reference),
        "pairs": len(pairs),
        "identical": error == 0,
        "psnr": _finite(_decibels(error)),
        "ssim": round(fmean(entry["ssim"] for entry in compared), 6),
        "max_error": max(entry["max_error"] for entry in compared),
        "samples": compared,
    }


def _pair(sample: Mapping[str, Any], frame: "Frame", path: Path) -> tuple[float, dict[str, Any]]:
    """The squared error of one pair, and what is reported of it."""
    other = _picture(path)
    _check_sizes(sample, frame.shape[:2], path, other.shape[:2])
    error = squared_error(frame, other)
    return error, {
        **{key: sample.get(key) for key in ("index", "prompt", "seed", "file")},
        "reference": path.name,
        "identical": error == 0,
        "psnr": _finite(_decibels(error)),
        "ssim": round(ssim(frame, other), 6),
        "max_error": max_error(frame, other),
    }


def _check_sizes(sample: Mapping[str, Any], size: Sequence[int], path: Path, other: Sequence[int]) -> None:
    """Raises UserError where a picture of height and width `size` cannot be compared with that of `path`."""
    (height, width), (other_height, other_width) = size, other
    if (height, width) != (other_height, other_width):
        raise UserError(
            f"{_name(sample)} is {width} x {height}, but its reference {path} is {other_width} x {other_height}"
        )
    if min(height, width) < WINDOW:
        raise UserError(f"{_name(sample)} is {width} x {height}, too small for SSIM (at least {WINDOW} x {WINDOW})")


def _finite(decibels: float) -> float | None:
    return None if math.isinf(decibels) else round(decibels, 4)


def _name(sample: Mapping[str, Any]) -> str:
    return f"The picture of seed {sample['seed']} and prompt '{shorten(str(sample['prompt']), 60)}'"


def _records(folder: Path) -> dict[tuple[Any, Any], list[tuple[Path, Any]]]:
    """(prompt, seed) -> pictures with their negative prompts, from the run records of a folder."""
    if not folder.is_dir():
        raise UserError(f"The reference folder {folder} does not exist")
    found: dict[tuple[Any, Any], list[tuple[Path, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        sample = None if path.name.startswith(".") else _sample(path)
        if sample is not None:
            picture, key = path.with_suffix(".png"), (sample.get("prompt"), sample.get("seed"))
            found.setdefault(key, []).append((picture, sample.get("negative_prompt")))
    if not found:
        raise UserError(
            f"The reference folder {folder} holds no run record (generated_image_0.json beside its picture)"
        )
    return found


def _sample(path: Path) -> dict[str, Any] | None:
    """What a run record says of its sample; None for any other JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} in the reference folder is not valid JSON") from None
    sample = content.get("sample") if isinstance(content, dict) else None
    return sample if isinstance(sample, dict) and {"prompt", "seed"} <= sample.keys() else None


def _counterpart(
    folder: Path, records: Mapping[tuple[Any, Any], list[tuple[Path, Any]]], sample: Mapping[str, Any]
) -> Path:
    found = records.get((sample["prompt"], sample["seed"]), [])
    if len(found) > 1:  # the negative prompt tells runs of one folder apart
        found = [entry for entry in found if entry[1] == sample.get("negative_prompt")] or found
    if len(found) > 1:
        names = ", ".join(path.name for path, _ in found)
        raise UserError(f"{_name(sample)} has several references in {folder}: {names}")
    if not found:
        raise UserError(f"{_name(sample)} has no reference in {folder}")
    return found[0][0]


def _picture(path: Path) -> "Frame":
    import numpy as np

    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


def _size_of(path: Path) -> tuple[int, int]:
    """Height and width of a picture whose file is whole."""
    with _opened(path) as image:
        width, height = image.size
        image.verify()  # its checksums; nothing is decoded
    return height, width


@contextmanager
def _opened(path: Path) -> "Iterator[Image.Image]":
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"The reference picture {path} is missing beside its record") from None
    except (UnidentifiedImageError, OSError, SyntaxError):  # PIL calls a broken PNG a SyntaxError
        raise UserError(f"The reference picture {path} cannot be read") from None


def sentence(found: Mapping[str, Any]) -> str:
    """A comparison in words for the log."""
    if found["identical"]:
        return "identical"
    return f"PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}, largest error {found['max_error']}"
