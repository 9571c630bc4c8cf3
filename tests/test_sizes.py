"""Sizes and frames: what engines return for images and videos, and who reads it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from native import COMMON
from tiny import wan

from sglang_gen.backends.native import safety_checker
from sglang_gen.outputs.save import Saved
from sglang_gen.types import Decoded, Sample


@pytest.fixture
def decoded(sglang, monkeypatch):
    """Run the command, and return the first result that an engine gave it."""
    seen: list[Decoded] = []
    add = Saved.add
    monkeypatch.setattr(Saved, "add", lambda self, number, result: (seen.append(result), add(self, number, result)))

    def run(model, *words: object) -> Decoded:
        done = sglang("generate", "--model-path", model, "--prompt", "a cat", *COMMON, "--width", 32,
                      "--num-inference-steps", 1, *words)  # fmt: skip
        assert done.code == 0, done.err
        return seen[0]

    return run


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_an_image_is_a_video_of_one_frame_on_both_backends(decoded, pipelines, backend):
    words = ("--backend", backend, "--height", 48, "--num-samples", 2, "sampling.batch_size=2")
    result = decoded(pipelines["sd3"], *words)
    assert (result.kind, result.frames.shape, result.frames.dtype) == ("image", (2, 1, 48, 32, 3), np.uint8)
    assert np.array_equal(result.saved(1), result.frames[1, 0])


@pytest.mark.whole
def test_a_video_of_diffusers_keeps_its_frames(decoded, tmp_path):
    result = decoded(wan(tmp_path / "wan"), "--height", 16, "--num-frames", 5)
    assert (result.kind, result.frames.shape) == ("video", (1, 5, 16, 32, 3))
    assert result.saved(0).shape == (5, 16, 32, 3)


class Checker:
    """Flags frames whose first pixel is above 100."""

    device = "cpu"

    def __call__(self, images, clip_input):
        assert len(images) == len(clip_input)
        return images, [image[0, 0, 0] > 100 for image in images]


def test_a_safety_checker_blanks_the_flagged_frames_of_a_video_and_warns_once_for_each_sample(caplog):
    frames = np.full((2, 3, 4, 4, 3), 50, np.uint8)
    frames[1, 1:] = 200
    extractor = lambda images, return_tensors: SimpleNamespace(pixel_values=torch.zeros(len(images), 3, 4, 4))  # noqa: E731
    components = {safety_checker.CHECKER: Checker(), safety_checker.EXTRACTOR: extractor}
    batch = (Sample(0, "a", None, 7), Sample(1, "a", None, 8))
    safety_checker.blank(components, frames, torch.float32, batch, warn=True)
    assert (frames[0] == 50).all()
    assert frames[1].reshape(3, -1).max(1).tolist() == [50, 0, 0]
    assert [record.message for record in caplog.records] == ["The model's safety checker blanked sample 1 (seed 8)"]
