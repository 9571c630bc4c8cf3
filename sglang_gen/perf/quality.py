"""Images against a reference: PSNR, SSIM and the largest difference, on uint8 frames `[H, W, 3]`."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sglang_gen import files
from sglang_gen.config.manifest import SETTING, Manifest
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.log import shorten
from sglang_gen.perf import agreement
from sglang_gen.types import Size

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Frame = np.ndarray[Any, np.dtype[np.uint8]]

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # the Gaussian window of SSIM, in pixels
K1, K2 = 0.01, 0.03


def squared_error(frame: "Frame", reference: "Frame") -> float:
    """Mean squared error over all pixels and channels. Raises ValueError if the frames cannot be compared."""
    import numpy as np

    _check(frame, reference)
    return float(np.mean(np.square(frame.astype(np.float64) - reference)))


def psnr(frame: "Frame", reference: "Frame") -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared error); math.inf for identical frames."""
    return decibels(squared_error(frame, reference))


def max_error(frame: "Frame", reference: "Frame") -> int:
    """The largest absolute difference over all pixels and channels, 0 to 255."""
    import numpy as np

    _check(frame, reference)
    return int(np.abs(frame.astype(np.int16) - reference).max())


def ssim(frame: "Frame", reference: "Frame") -> float:
    """Structural similarity, 1 for identical frames: the mean over the three channels, computed separately.

    Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE Transactions on Image Processing 13, 2004, equation 13 with its constants: Gaussian
    window of 11 x 11 pixels, sigma 1.5, sum 1, without padding; K1 = 0.01, K2 = 0.03, L = 255. The paper compares
    luminance; here channels are averaged so that a change of colour alone is detected too. Computed in float64.
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
    """Gaussian filter without padding: [C, H, W] -> [C, H - 10, W - 10]."""
    weights = [math.exp(-((index - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for index in range(WINDOW)]
    weights = [weight / sum(weights) for weight in weights]
    height, width = (size - WINDOW + 1 for size in planes.shape[1:])
    rows = sum(weight * planes[:, shift : shift + height] for shift, weight in enumerate(weights))
    return sum(weight * rows[:, :, shift : shift + width] for shift, weight in enumerate(weights))  # type: ignore


def changed(frame: "Frame", reference: "Frame") -> float:
    """The fraction of the values (pixels times channels) that differ."""
    import numpy as np

    _check(frame, reference)
    return float(np.mean(frame != reference))


def _check(frame: "Frame", reference: "Frame") -> None:
    for one in (frame, reference):
        if one.dtype.name != "uint8" or one.ndim != 3 or one.shape[2] != 3:
            raise ValueError(f"a frame is uint8 [H, W, 3], not {one.dtype} {list(one.shape)}")
    if frame.shape != reference.shape:
        raise ValueError(f"the frames have different sizes, {_size(frame)} and {_size(reference)}")


def _size(frame: "Frame") -> str:
    return f"{frame.shape[1]} x {frame.shape[0]}"


def decibels(error: float) -> float:
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def squared_error_of(psnr: float) -> float:
    """The mean squared error of a PSNR in dB."""
    return float(PEAK**2 / 10 ** (psnr / 10))


def counterparts(
    reference: str | Path,
    samples: Sequence[Mapping[str, Any]],
    size: Size | None = None,
    manifest: Manifest | None = None,
) -> list[Path]:
    """Find the reference image of each sample in the folder `reference`: the one with the same prompt and seed.

    A sample has `prompt`, `seed` and possibly `negative_prompt`, which decides if several images match; `size` is the
    size of all images, if known, and `manifest` the manifest of the run. Call this before a run, so that it fails
    before work is done and does not find the run's own images. Raises UserError if an image is missing, ambiguous,
    broken or of another size, and if all images were made with other manifests.
    """
    folder = Path(reference)
    records = _records(folder, manifest)
    paths = [_counterpart(folder, records, sample) for sample in samples]
    for sample, path in zip(samples, paths, strict=True):
        own = _size_of(path)
        if size is not None:
            _check_sizes(sample, (size.height, size.width), path, own)
    return paths


def compare(
    reference: str | Path,
    samples: Sequence[Mapping[str, Any]],
    frames: Sequence["Frame"],
    found: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """Compare a finished run with the run records in the folder `reference`; returns JSON-serializable data.

    `samples[i]` describes `frames[i]`; `found` is the result of `counterparts` before the run. Returns `{reference,
    pairs, verdict, identical, psnr, ssim, max_error, summary, samples}`: `psnr` is computed from the mean squared error
    over all pairs (None if all are identical), `ssim` is the mean, `max_error` the maximum; `verdict` and `summary` are
    those of `agreement`. Raises UserError if a reference image is missing, ambiguous, broken or of another size.
    """
    if not samples:
        raise UserError("There is no image to compare with a reference")
    paths = counterparts(reference, samples) if found is None else found
    pairs = [_compare_pair(*item) for item in zip(samples, frames, paths, strict=True)]
    error = fmean(squared for squared, _ in pairs)
    compared = [entry for _, entry in pairs]
    return {
        "reference": str(reference),
        "pairs": len(pairs),
        "verdict": agreement.verdict(compared),
        "identical": error == 0,
        "psnr": _finite(decibels(error)),
        "ssim": round(fmean(entry["ssim"] for entry in compared), 6),
        "max_error": max(entry["max_error"] for entry in compared),
        "summary": agreement.summaries(compared),
        "samples": compared,
    }


def _compare_pair(sample: Mapping[str, Any], frame: "Frame", path: Path) -> tuple[float, dict[str, Any]]:
    """The mean squared error of one pair, and its entry in the report."""
    other = read_reference(path)
    _check_sizes(sample, frame.shape[:2], path, other.shape[:2])
    error = squared_error(frame, other)
    return error, {
        **{key: sample.get(key) for key in ("index", "prompt", "seed", "file")},
        "reference": path.name,
        "identical": error == 0,
        "psnr": _finite(decibels(error)),
        "ssim": round(ssim(frame, other), 6),
        "max_error": max_error(frame, other),
        "changed": round(changed(frame, other), 6),
    }


def _check_sizes(sample: Mapping[str, Any], size: Sequence[int], path: Path, other: Sequence[int]) -> None:
    """Raises UserError if an image of height and width `size` cannot be compared with the one at `path`."""
    (height, width), (other_height, other_width) = size, other
    if (height, width) != (other_height, other_width):
        raise UserError(
            f"{_name(sample)} is {width} x {height}, but its reference {path} is {other_width} x {other_height}"
        )
    if min(height, width) < WINDOW:
        raise UserError(f"{_name(sample)} is {width} x {height}, too small for SSIM (at least {WINDOW} x {WINDOW})")


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else round(value, 4)


def _name(sample: Mapping[str, Any]) -> str:
    return f"The image of seed {sample['seed']} and prompt '{shorten(str(sample['prompt']), 60)}'"


def _records(folder: Path, manifest: Manifest | None) -> dict[tuple[Any, Any], list[tuple[Path, Any]]]:
    """(prompt, seed) -> images with their negative prompts, from the run records of a folder."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        raise UserError(f"The reference folder {folder} does not exist") from None
    except OSError as error:
        raise UserError(f"The reference folder {folder} cannot be read: {error.strerror}") from None
    records: dict[tuple[Any, Any], list[tuple[Path, Any]]] = {}
    manifests: dict[str | None, str] = {}  # digest -> name
    for path in (folder / name for name in names):
        content = _record(path)
        if sample := content.get("sample"):
            image, key = path.with_suffix(".png"), (sample.get("prompt"), sample.get("seed"))
            records.setdefault(key, []).append((image, sample.get("negative_prompt")))
            digest, name = (_at(content, path) for path in (("inputs", SETTING), ("run", *SETTING.split("."))))
            manifests[digest] = str(name)
    if not records:
        raise UserError(f"The reference folder {folder} holds no run record (generated_image_0.json next to its image)")
    if manifest is not None and not {manifest.digest, None} & manifests.keys():
        others = ", ".join(f"{name} (digest {str(digest)[:12]})" for digest, name in manifests.items())
        raise UserError(
            f"quality.reference: the images in {folder} were made with the manifest {others}, and this run has "
            f"{manifest.name} (digest {manifest.digest[:12]}); name a run with the same manifest"
        )
    return records


def _record(path: Path) -> dict[str, Any]:
    """A run record; empty for any other JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} in the reference folder cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} in the reference folder is not valid JSON") from None
    sample = content.get("sample") if isinstance(content, dict) else None
    return content if isinstance(sample, dict) and {"prompt", "seed"} <= sample.keys() else {}


def _at(content: Any, path: Sequence[str]) -> Any:
    """The value at a path of nested mappings; None if there is none."""
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _counterpart(
    folder: Path, records: Mapping[tuple[Any, Any], list[tuple[Path, Any]]], sample: Mapping[str, Any]
) -> Path:
    entries = records.get((sample["prompt"], sample["seed"]), [])
    if len(entries) > 1:  # the negative prompt distinguishes runs in one folder
        entries = [entry for entry in entries if entry[1] == sample.get("negative_prompt")] or entries
    if len(entries) > 1:
        names = ", ".join(path.name for path, _ in entries)
        raise UserError(f"{_name(sample)} has several references in {folder}: {names}")
    if not entries:
        raise UserError(f"{_name(sample)} has no reference in {folder}")
    return entries[0][0]


def read_reference(path: Path) -> "Frame":
    """The reference image at `path`. Raises UserError if it is missing or damaged."""
    import numpy as np

    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


def _size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image. Raises UserError if the file is damaged."""
    with _opened(path) as image:
        width, height = image.size
        image.verify()  # verifies checksums without decoding
    return height, width


@contextmanager
def _opened(path: Path) -> "Iterator[Image.Image]":
    try:
        with files.opened_image(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"The reference image {path} is missing next to its run record") from None
    except (OSError, ValueError) as error:
        raise UserError(f"The reference image {path} cannot be read: {in_our_words(error)}") from error


def sentence(comparison: Mapping[str, Any]) -> str:
    """The result of `compare` as a phrase for the log."""
    if comparison["identical"]:
        return "identical"
    figures = (
        f"PSNR {comparison['psnr']:.2f} dB, SSIM {comparison['ssim']:.4f}, largest error {comparison['max_error']}"
    )
    worst = comparison["summary"]["psnr"]["worst"]
    if comparison["pairs"] > 1:
        figures += f"; worst image {worst['index']} ({worst['value']:.2f} dB, '{shorten(worst['prompt'], 40)}')"
    return f"{comparison['verdict']}, {figures}"
