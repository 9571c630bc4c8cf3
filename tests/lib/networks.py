"""What the tests of replaced and quantized weights share: the networks' classes, and what a run left."""

import json
from pathlib import Path

import diffusers
import numpy as np
from PIL import Image

CLASSES = {
    "flux": (diffusers.FluxPipeline, diffusers.FluxTransformer2DModel, "transformer"),
    "sd3": (diffusers.StableDiffusion3Pipeline, diffusers.SD3Transformer2DModel, "transformer"),
    "sdxl": (diffusers.StableDiffusionXLPipeline, diffusers.UNet2DConditionModel, "unet"),
}


def picture(number: int = 0) -> np.ndarray:
    return np.asarray(Image.open(f"outputs/generated_image_{number}.png")).astype(int)


def effective(number: int = 0) -> dict:
    return json.loads(Path(f"outputs/generated_image_{number}.json").read_text())["effective"]
