"""The invisible watermark of diffusers' SDXL pipelines, added if the library invisible-watermark is installed.

`add_watermarker` in a model's model_index.json requires or disables it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sglang_gen.errors import UserError


def check_library(settings: Mapping[str, Any]) -> None:
    """Raises UserError if the model requires a watermark and the library is not installed."""
    if settings.get("add_watermarker") and not _is_installed():
        raise UserError("add_watermarker: this model requires a watermark; pip install invisible-watermark")


def watermarked(images: Tensor, wanted: bool | None) -> Tensor:
    """Add the watermark to images `[B, 3, H, W]` in -1..1, unless `wanted` is False or the library is missing."""
    if wanted is False or not _is_installed():
        return images
    from diffusers.pipelines.stable_diffusion_xl.watermark import StableDiffusionXLWatermarker

    return StableDiffusionXLWatermarker().apply_watermark(images)


def _is_installed() -> bool:
    from diffusers.utils import is_invisible_watermark_available

    return bool(is_invisible_watermark_available())
