"""Reads input files of a request: images, and noise that an earlier run saved."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_gen import files, log
from sglang_gen.errors import UserError, in_our_words

WHITE_16 = 2**16 - 1


def read_noise(path: str | None) -> torch.Tensor | None:
    """The tensor `noise` of a saved latents file, `[1, ...]`. Raises UserError if it cannot be read."""
    if path is None:
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if "noise" not in names:
                raise UserError(f"sampling.latents: {path} holds no tensor 'noise'")
            noise: torch.Tensor = file.get_tensor("noise")
            return noise.unsqueeze(0)
    except (OSError, SafetensorError) as error:
        raise UserError(f"sampling.latents: {path} cannot be read: {in_our_words(error)}") from error


def read_image(path: str, setting: str) -> Any:
    """An input image or mask as RGB, rotated as its EXIF orientation says. Raises UserError naming the setting."""
    from PIL import ImageOps

    try:
        with files.opened_image(Path(path).expanduser()) as image:
            if getattr(image, "n_frames", 1) > 1:
                log.warn_once(f"{setting}: {path} has {image.n_frames} frames; the first one is used")
            return _rgb(ImageOps.exif_transpose(image), f"{setting}: {path}")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{setting}: the image {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} is not a readable image ({in_our_words(error)})") from error


def _rgb(image: Any, what: str) -> Any:
    """Convert to RGB with 8 bits per channel. Raises UserError if the range of the image's values is unknown."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        numbers = np.asarray(image)
        if image.mode == "F" or not 0 <= numbers.min() <= numbers.max() <= WHITE_16:
            raise UserError(f"{what} has values that are neither 8-bit nor 16-bit integers; save it as one of these")
        return Image.fromarray(np.rint(numbers / (WHITE_16 / 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        log.warn_once(f"{what} has transparent pixels; their transparency is ignored")
    return image.convert("RGB")
