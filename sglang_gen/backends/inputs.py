"""Files that a request starts from: noise that an earlier run saved, and pictures."""

from pathlib import Path
from typing import Any

import torch

from sglang_gen.errors import UserError, first_line


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
    """An input picture as RGB (masks too). Raises UserError naming the setting."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{setting}: the image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} is not a readable image ({first_line(error)})") from None
