"""The safety checker: blanks the images that it flags, as diffusers' pipeline does."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from sglang_gen import log
from sglang_gen.types import Sample

CHECKER, EXTRACTOR = "safety_checker", "feature_extractor"


def blank(
    components: Mapping[str, Any],
    frames: "np.ndarray[Any, Any]",
    dtype: torch.dtype,
    batch: tuple[Sample, ...],
    warn: bool,
) -> None:
    """Set flagged frames of `[B, F, H, W, 3]` uint8 to black, in place; with `warn`, log one for each sample."""
    checker = components.get(CHECKER)
    if checker is None:
        return
    single = [frame for video in frames for frame in video]  # views, in the order of the samples
    images = [Image.fromarray(frame) for frame in single]
    pixels = components[EXTRACTOR](images, return_tensors="pt").pixel_values.to(checker.device, dtype)
    _, flags = checker(images=[frame.copy() for frame in single], clip_input=pixels)
    flagged = np.asarray(flags, dtype=bool).reshape(frames.shape[:2])
    frames[flagged] = 0
    for sample, video in zip(batch, flagged, strict=True):
        if warn and video.any():
            log.warning(f"The model's safety checker blanked sample {sample.index} (seed {sample.seed})")
