"""The safety checker of a model that has one: which pictures it blanks, as diffusers' pipeline does."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from sglang_gen import log
from sglang_gen.types import Sample

CHECKER, EXTRACTOR = "safety_checker", "feature_extractor"


def blank(
    parts: Mapping[str, Any], frames: "np.ndarray[Any, Any]", dtype: torch.dtype, batch: tuple[Sample, ...], said: bool
) -> None:
    """Make flagged frames of `[B, H, W, 3]` uint8 black, and warn of each where that is to be `said`."""
    checker = parts.get(CHECKER)
    if checker is None:
        return
    pictures = [Image.fromarray(frame) for frame in frames]
    pixels = parts[EXTRACTOR](pictures, return_tensors="pt").pixel_values.to(checker.device, dtype)
    _, flagged = checker(images=list(frames.copy()), clip_input=pixels)
    for frame, flag, sample in zip(frames, flagged, batch, strict=True):
        if flag:
            frame[:] = 0
            if said:
                log.warning(f"The model's safety checker blanked sample {sample.index} (seed {sample.seed})")
