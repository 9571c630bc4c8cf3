"""Picture quality: PSNR, SSIM and largest error against their formulas, and a run against a folder of run records."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from PIL import Image

from sglang_gen.errors import UserError
from sglang_gen.perf import quality

C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def noise(height: int = 16, width: int = 19, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def near(frame: np.ndarray, spread: int = 20, seed: int = 1) -> np.ndarray:
    shifts = np.random.default_rng(seed).integers(-spread, spread + 1, frame.shape)
    return np.clip(frame.astype(int) + shifts, 0, 255).astype(np.uint8)


def flat(value: int, height: int = 12, width: int = 14) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def slow_ssim(left: np.ndarray, right: np.ndarray) -> float:
    """Equation 13 of the paper, window by window, with the weighted moments of its equations 14 to 16."""
    grid = np.arange(11) - 5
    window = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for channel in range(3):
        for row in range(left.shape[0] - 10):
            for column in range(left.shape[1] - 10):
                x = left[row : row + 11, column : column + 11, channel].astype(float)
                y = right[row : row + 11, column : column + 11, channel].astype(float)
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                found.append((2 * mx * my + C1) * (2 * cov + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2)))
    return float(np.mean(found))


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 20), (17, 13)])
@pytest.mark.parametrize("spread", [3, 60])
def test_ssim_is_the_papers_formula(height, width, spread):
    left = noise(height, width)
    right = near(left, spread)
    assert quality.ssim(left, right) == pytest.approx(slow_ssim(left, right), abs=1e-9)


@pytest.mark.parametrize(("left", "right"), [(0, 255), (100, 110), (0, 0), (7, 200)])
def test_ssim_of_constant_frames_is_its_luminance_term(left, right):
    expected = (2 * left * right + C1) / (left**2 + right**2 + C1)
    assert quality.ssim(flat(left), flat(right)) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_a_constant_shift_keeps_contrast_and_structure():
    left = (noise(30, 30) // 2) + 40
    assert quality.ssim(left, left + 10) > 0.97
    assert quality.ssim(left, 255 - left) < 0


def test_a_change_of_colour_alone_lowers_ssim():
    left = noise(20, 20)
    assert quality.ssim(left, left[:, :, ::-1]) < 0.5


def test_psnr_is_its_formula():
    left, right = flat(100), flat(100)
    right[0, 0, 0] = 110
    assert quality.psnr(left, right) == pytest.approx(10 * math.log10(255**2 / (100 / left.size)))
    assert quality.psnr(flat(0), flat(255)) == 0.0
    assert quality.psnr(flat(0), flat(1)) == pytest.approx(48.1308, abs=1e-4)
    assert quality.max_error(left, right) == 10
    assert quality.max_error(flat(0), flat(255)) == 255


frames = arrays(np.uint8, (12, 11, 3))


@given(frames, frames)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_every_measure_is_symmetric_and_perfect_for_identical_frames_alone(left, right):
    assert quality.psnr(left, right) == quality.psnr(right, left)
    assert quality.max_error(left, right) == quality.max_error(right, left)
    assert quality.ssim(left, right) == pytest.approx(quality.ssim(right, left), abs=1e-12)
    assert quality.ssim(left, right) <= 1 + 1e-9
    assert quality.ssim(left, left) == pytest.approx(1, abs=1e-12)
    assert (
        (quality.psnr(left, right) == math.inf) == (quality.max_error(left, right) == 0) == np.array_equal(left, right)
    )
    assert quality.psnr(left, left) == math.inf


def test_frames_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match="SSIM needs at least 11 x 11 pixels, these frames have 30 x 10"):
        quality.ssim(noise(10, 30), noise(10, 30))
    for measure in (quality.psnr, quality.ssim, quality.max_error):
        with pytest.raises(ValueError, match="different sizes, 12 x 11 and 11 x 12"):
            measure(noise(11, 12), noise(12, 11))
        with pytest.raises(ValueError, match=r"a frame is uint8 \[H, W, 3\], not float64 \[12, 12, 3\]"):
            measure(noise(12, 12).astype(float), noise(12, 12))
        with pytest.raises(ValueError, match=r"not uint8 \[12, 12\]"):
            measure(noise(12, 12), noise(12, 12)[:, :, 0])


def sample(seed: int, prompt: str = "a lake", negative: str | None = None) -> dict:
    return {"index": 0, "prompt": prompt, "negative_prompt": negative, "seed": seed, "file": "new.png"}


def keep(number: int, frame: np.ndarray, described: dict, folder: str = "reference") -> None:
    """A picture and its run record, as a run leaves them."""
    Path(folder).mkdir(exist_ok=True)
    Image.fromarray(frame).save(Path(folder) / f"generated_image_{number}.png")
    record = {"schema_version": 1, "file": f"generated_image_{number}.png", "sample": described}
    (Path(folder) / f"generated_image_{number}.json").write_text(json.dumps(record), encoding="utf-8")


def test_a_run_is_matched_by_prompt_and_seed_whatever_the_order():
    first, second = noise(seed=1), noise(seed=2)
    keep(0, second, sample(8))
    keep(1, first, sample(7))
    Path("reference/perf.json").write_text('{"samples": [], "total_duration_ms": 1}')
    found = quality.compare("reference", [sample(7), sample(8)], [near(first, 9), second])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["pairs"], found["identical"], found["max_error"]) == (2, False, 9)
    changed, same = found["samples"]
    assert (changed["reference"], same["reference"]) == ("generated_image_1.png", "generated_image_0.png")
    assert (same["psnr"], same["ssim"], same["max_error"], same["identical"]) == (None, 1.0, 0, True)
    assert changed["psnr"] == pytest.approx(quality.psnr(near(first, 9), first), abs=1e-4)
    assert found["psnr"] == pytest.approx(changed["psnr"] + 10 * math.log10(2), abs=1e-3)
    assert found["ssim"] == pytest.approx((changed["ssim"] + 1) / 2, abs=1e-6)


def test_a_repeated_run_is_identical():
    keep(0, noise(), sample(7))
    found = quality.compare("reference", [sample(7)], [noise()])
    assert (found["identical"], found["psnr"], found["ssim"], found["max_error"]) == (True, None, 1.0, 0)


def test_the_negative_prompt_chooses_among_several_pictures():
    keep(0, noise(seed=1), sample(7, negative="grey"))
    keep(1, noise(seed=2), sample(7))
    assert quality.counterparts("reference", [sample(7)]) == [Path("reference/generated_image_1.png")]
    assert quality.counterparts("reference", [sample(7, negative="grey")]) == [Path("reference/generated_image_0.png")]
    keep(2, noise(seed=3), sample(7))
    with pytest.raises(
        UserError, match=r"several references in reference: generated_image_1\.png, generated_image_2\.png"
    ):
        quality.counterparts("reference", [sample(7)])


def test_counterparts_found_before_a_run_are_not_its_own_pictures():
    keep(0, noise(seed=1), sample(7), folder="shared")
    found = quality.counterparts("shared", [sample(7)])
    keep(1, noise(seed=2), sample(7), folder="shared")
    assert not quality.compare("shared", [sample(7)], [noise(seed=2)], found)["identical"]


@pytest.mark.parametrize(
    ("described", "frame", "sentence"),
    [
        (sample(8), noise(), "The image of seed 8 and prompt 'a lake' has no reference in reference"),
        (sample(7, "a fox"), noise(), "The image of seed 7 and prompt 'a fox' has no reference in reference"),
        (sample(7), noise(16, 16), r"is 16 x 16, but its reference reference/generated_image_0\.png is 19 x 16"),
        (sample(1), noise(8, 8), r"is 8 x 8, too small for SSIM \(at least 11 x 11\)"),
    ],
)
def test_a_missing_counterpart_or_another_size_is_named(described, frame, sentence):
    keep(0, noise(), sample(7))
    keep(1, noise(8, 8), sample(1))
    with pytest.raises(UserError, match=sentence):
        quality.compare("reference", [described], [frame])


def test_a_broken_reference_is_named():
    with pytest.raises(UserError, match="The reference folder reference does not exist"):
        quality.counterparts("reference", [sample(7)])
    Path("reference").mkdir()
    with pytest.raises(UserError, match="holds no run record"):
        quality.counterparts("reference", [sample(7)])
    keep(0, noise(), sample(7))
    with pytest.raises(UserError, match="There is no image to compare"):
        quality.compare("reference", [], [])
    picture = Path("reference/generated_image_0.png")
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(UserError, match=r"generated_image_0\.png cannot be read"):
        quality.compare("reference", [sample(7)], [noise()])
    picture.unlink()
    with pytest.raises(UserError, match=r"generated_image_0\.png is missing next to its run record"):
        quality.compare("reference", [sample(7)], [noise()])
    Path("reference/generated_image_1.json").write_text("{")
    with pytest.raises(UserError, match=r"generated_image_1\.json in the reference folder is not valid JSON"):
        quality.counterparts("reference", [sample(7)])


def test_the_samples_of_a_real_run_find_their_records(pipelines, sglang):
    small = (
        "--height",
        "32",
        "--width",
        "32",
        "--num-inference-steps",
        "1",
        "--num-samples",
        "2",
        "sampling.batch_size=2",
    )
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", "--negative-prompt", "b", *small,
                  "--perf-dump-path", "outputs/perf.json", "perf.work=false", "perf.machine_rates=false")  # fmt: skip
    assert done.code == 0, done.err
    samples = json.loads(Path("outputs/perf.json").read_text())["samples"]
    pictures = [np.asarray(Image.open(Path("outputs") / entry["file"])) for entry in samples]
    found = quality.compare("outputs", samples, pictures)
    assert (found["pairs"], found["identical"]) == (2, True)
    assert not quality.compare("outputs", samples, pictures[::-1])["identical"]


SMALL = ("--prompt", "a lake", "--seed", "7", "--num-inference-steps", "1", "perf=light")


@pytest.fixture
def unloaded(monkeypatch):
    """No engine may be loaded."""

    def load(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("sglang_gen.backends.native.engine.load", load)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda path: None, "is 32 x 64, but its reference reference/generated_image_0.png is 19 x 16"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "reference/generated_image_0.png cannot be read"),
        (lambda path: path.unlink(), "reference/generated_image_0.png is missing next to its run record"),
    ],
)
def test_a_reference_that_cannot_be_compared_is_refused_before_loading(pipelines, sglang, unloaded, break_it, sentence):
    keep(0, noise(), sample(7))
    break_it(Path("reference/generated_image_0.png"))
    done = sglang("generate", "--model-path", pipelines["sd3"], *SMALL, "--height", "64", "--width", "32",
                  "quality.reference=reference")  # fmt: skip
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


def test_the_models_own_size_is_known_before_loading(pipelines, sglang, unloaded):
    keep(0, noise(), sample(7))
    done = sglang("generate", "--model-path", pipelines["sd3"], *SMALL, "quality.reference=reference")
    assert (done.code, "but its reference reference/generated_image_0.png is 19 x 16" in done.lines[-1]) == (2, True)


@pytest.mark.whole
def test_a_comparison_that_fails_after_the_run_costs_neither_the_dump_nor_the_jobs_pictures(pipelines, sglang):
    keep(0, noise(), sample(7))
    done = sglang("generate", "--model-path", pipelines["sd15"], *SMALL, "--backend", "diffusers", "tracking=csv",
                  "quality.reference=reference", "--output-path", "sweep", "-m")  # fmt: skip
    assert done.code == 1
    note, dump = (json.loads(Path("sweep/0", name).read_text()) for name in ("job.json", "perf.json"))
    assert (note["status"], note["files"]) == ("failed", ["generated_image_0.png"])
    assert note["error"].startswith("The images are saved, but not compared: The image of seed 7 and prompt")
    assert (dump["quality"], dump["total_duration_ms"] > 0) == (None, True)
    assert Path("sweep/0/runs.csv").exists()
    assert "- 0: The images are saved, but not compared: " in Path("sweep/table.md").read_text()


def test_a_reference_that_cannot_be_read_is_told_from_one_that_is_not_there(tmp_path, monkeypatch):
    samples = [{"prompt": "a lake", "seed": 1}]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The reference folder .*file cannot be read: Not a directory"):
        quality.counterparts(tmp_path / "file", samples)
    (tmp_path / "folder" / "generated_image_0.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"generated_image_0\.json in the reference folder cannot be read: Is a dir"):
        quality.counterparts(tmp_path / "folder", samples)
    monkeypatch.setattr(os, "listdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"The reference folder .*folder cannot be read: Permission denied"):
        quality.counterparts(tmp_path / "folder", samples)
