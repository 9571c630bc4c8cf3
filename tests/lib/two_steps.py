"""Runs of two steps with a tiny pipeline, and what they leave."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = ("--height", "32", "--width", "32", "--seed", "7", "--dtype", "float32")


def picture(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(number: int = 0) -> dict:
    return json.loads(Path(f"outputs/generated_image_{number}.json").read_text())


def two_steps(pipelines, sglang):
    """A function that generates two steps with a tiny pipeline; the finished command."""

    def generate(name: str, *words: object, steps: int = 2):
        return sglang("generate", "--model-path", pipelines[name], "--prompt", "a cat", *SIZE,
                      "--num-inference-steps", steps, *words)  # fmt: skip

    return generate
