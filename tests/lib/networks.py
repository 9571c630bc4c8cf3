"""What the tests of replaced and quantized weights share: the networks' classes, and what a run left."""

import json
from pathlib import Path

import diffusers
import numpy as np
import tiny
from PIL import Image

from sglang_gen.families import registry

CLASSES = {
    spec.name: (getattr(diffusers, spec.pipeline_class), getattr(diffusers, spec.network_classes[0]), spec.network)
    for spec in registry.specs()
    if spec.name in tiny.BUILDERS
}


def picture(number: int = 0) -> np.ndarray:
    return np.asarray(Image.open(f"outputs/generated_image_{number}.png")).astype(int)


def effective(number: int = 0) -> dict:
    return json.loads(Path(f"outputs/generated_image_{number}.json").read_text())["effective"]
