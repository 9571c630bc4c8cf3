"""Files that a request starts from: noise that an earlier run saved, and pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_gen import log
from sglang_gen.errors import UserError, first_line

WHITE_16 = 2**16 - 1


def read_noise(path: str | None) -> torch.Tensor | None:
    """The `noise` of a latents file, [1, ...]. Raises UserError when the file is not one of ours."""
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
        raise UserError(f"sampling.latents: {path} cannot be read: {first_line(error)}") from None


def read_image(path: str, setting: str) -> Any:
    """An input picture as RGB (masks too), upright as its camera says. Raises UserError naming the setting."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as image:
            if getattr(image, "n_frames", 1) > 1:
                log.warn_once(f"{setting}: {path} has {image.n_frames} frames; the first is taken")
            return _rgb(ImageOps.exif_transpose(image), f"{setting}: {path}")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{setting}: the image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} is not a readable image ({first_line(error)})") from None


def _rgb(image: Any, what: str) -> Any:
    """Eight bits a channel of what a picture shows. Raises UserError where its numbers do not say what is white."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        numbers = np.asarray(image)
        if image.mode == "F" or not 0 <= numbers.min() <= numbers.max() <= WHITE_16:
            raise UserError(f"{what} has numbers of another range than 8 or 16 bits; save it with one of these")
        return Image.fromarray(np.rint(numbers / (WHITE_16 / 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        log.warn_once(f"{what} is transparent in places; the colours behind that are taken")
    return image.convert("RGB")
