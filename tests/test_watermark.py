"""The invisible watermark of SDXL: set where diffusers' pipeline sets it, with a stand-in for the library."""

import sys
import types

import diffusers.utils
import pytest
import torch
from native import edited, runner

from sglang_gen.errors import UserError
from sglang_gen.families import watermark


class Negating:
    def apply_watermark(self, pictures):
        return -pictures


@pytest.fixture
def installed(monkeypatch):
    """A function that says whether the library is there."""
    library = types.SimpleNamespace(StableDiffusionXLWatermarker=Negating)
    monkeypatch.setitem(sys.modules, "diffusers.pipelines.stable_diffusion_xl.watermark", library)
    return lambda there: monkeypatch.setattr(diffusers.utils, "is_invisible_watermark_available", lambda: there)


@pytest.mark.parametrize(
    ("there", "wanted", "marked"),
    [(True, None, True), (True, True, True), (True, False, False), (False, None, False), (False, False, False)],
)
def test_a_picture_is_marked_where_the_library_is_and_the_model_does_not_mind(installed, there, wanted, marked):
    installed(there)
    pictures = torch.ones(1, 3, 2, 2)
    assert torch.equal(watermark.watermarked(pictures, wanted), -pictures if marked else pictures)


def test_a_mark_that_cannot_be_set_is_an_error(installed):
    installed(False)
    with pytest.raises(UserError, match="this model requires a watermark; pip install invisible-watermark"):
        watermark.check_library({"add_watermarker": True})


def test_what_the_model_says_comes_from_its_index(installed, pipelines, sglang):
    installed(False)
    model = edited(pipelines["sdxl"], "model", "model_index.json", add_watermarker=True)
    done = runner(pipelines, sglang)(str(model), "--backend", "sglang", steps=1)
    assert (done.code, "add_watermarker: this model requires a watermark" in done.err) == (2, True)
    assert "Progress" not in done.err
