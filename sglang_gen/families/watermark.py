"""The invisible watermark of diffusers' SDXL, which it sets wherever the library for it is installed.

A model may want it (`add_watermarker` of its model_index.json), or want none.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sglang_gen.errors import UserError


def check(settings: Mapping[str, Any]) -> None:
    """Raises UserError where a model wants one and there is no library."""
    if settings.get("add_watermarker") and not _there():
        raise UserError("add_watermarker: this model wants a watermark; pip install invisible-watermark")


def marked(pictures: Tensor, wanted: bool | None) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1 with the mark, where the library is there; None leaves it to that."""
    if wanted is False or not _there():
        return pictures
    from diffusers.pipelines.stable_diffusion_xl.watermark import StableDiffusionXLWatermarker

    return StableDiffusionXLWatermarker().apply_watermark(pictures)


def _there() -> bool:
    from diffusers.utils import is_invisible_watermark_available

    return bool(is_invisible_watermark_available())
