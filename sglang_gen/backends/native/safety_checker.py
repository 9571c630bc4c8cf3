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
    """Set flagged frames of `[B, H, W, 3]` uint8 to black, in place; with `warn`, log a warning for each."""
    checker = components.get(CHECKER)
    if checker is None:
        return
    images = [Image.fromarray(frame) for frame in frames]
    pixels = components[EXTRACTOR](images, return_tensors="pt").pixel_values.to(checker.device, dtype)
    _, flagged = checker(images=list(frames.copy()), clip_input=pixels)
    for frame, flag, sample in zip(frames, flagged, batch, strict=True):
        if flag:
            frame[:] = 0
            if warn:
                log.warning(f"The model's safety checker blanked sample {sample.index} (seed {sample.seed})")
