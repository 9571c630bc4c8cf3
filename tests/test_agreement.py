"""Verdicts, summaries over images, metrics of other packages, and images without content."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sglang_gen.errors import RunError, UserError
from sglang_gen.launch import judging
from sglang_gen.perf import agreement, blank_images, metrics, quality

PACKAGE = """
def brightness(image, reference, prompt):
    return image.mean() if reference is None else image.mean() + 0 * reference.mean()

def distance(image, reference, prompt):
    return abs(image.astype(float) - reference).mean()

distance.higher_is_better = False

def broken(image, reference, prompt):
    raise KeyError(prompt)

def infinite(image, reference, prompt):
    return float("inf")

number = 3
"""


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A distribution that offers metrics, installed for this test."""
    (tmp_path / "measures_of_others.py").write_text(PACKAGE)
    folder = tmp_path / "measures_of_others-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: measures-of-others\nVersion: 1.0\n")
    names = ("brightness", "distance", "broken", "infinite", "number")
    offered = [f"{name} = measures_of_others:{name}" for name in names] + ["absent = no_such_module:x"]
    (folder / "entry_points.txt").write_text("\n".join([f"[{metrics.GROUP}]", *offered]))
    monkeypatch.syspath_prepend(str(tmp_path))


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 230, (64, 64, 3), dtype=np.uint8)


def shifted(frame: np.ndarray, values: int, by: int = 1) -> np.ndarray:
    """The frame with `values` of its values changed."""
    other = frame.copy()
    other.reshape(-1)[:values] += by
    return other


def entry(index: int, frame: np.ndarray, other: np.ndarray) -> dict:
    psnr = quality.psnr(frame, other)
    return {
        "index": index, "prompt": f"prompt {index}", "seed": index, "identical": math.isinf(psnr),
        "psnr": None if math.isinf(psnr) else psnr, "ssim": quality.ssim(frame, other),
        "max_error": quality.max_error(frame, other), "changed": quality.changed(frame, other),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "by", "verdict"),
    [
        (0, 0, "identical"),
        (1, 1, "equal within rounding"),
        (122, 1, "equal within rounding"),
        (123, 1, "approximate"),
        (1, 2, "approximate"),
    ],
)
def test_the_verdict_of_the_worst_image_is_that_of_the_run(values, by, verdict):
    frame = noise()  # 12288 values
    same, other = entry(0, frame, frame), entry(1, shifted(frame, values, by), frame)
    assert agreement.verdict([other]) == agreement.verdict([same, other]) == verdict


def test_a_summary_has_mean_standard_error_and_the_worst_image():
    frame = noise()
    entries = [entry(index, shifted(frame, 100, by), frame) for index, by in enumerate((1, 7, 3, 0))]
    found = agreement.summaries(entries)
    values = [item["psnr"] for item in entries[:3]]
    assert found["psnr"]["images"] == 3  # the identical image has no PSNR
    assert found["psnr"]["mean"] == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert found["psnr"]["standard_error"] == pytest.approx(statistics.stdev(values) / math.sqrt(3), abs=1e-6)
    assert found["psnr"]["worst"] == {"index": 1, "prompt": "prompt 1", "seed": 1, "value": values[1]}
    assert found["max_error"]["worst"]["value"] == 7
    assert found["max_error"]["mean"] == pytest.approx(11 / 4)
    assert agreement.summaries(entries[3:])["psnr"] == {
        "images": 0, "mean": None, "standard_error": None, "worst": None
    }  # fmt: skip
    assert agreement.summaries(entries[:1])["ssim"]["standard_error"] is None


def test_a_metric_of_another_package_has_its_paired_difference_to_the_reference(package):
    loaded = metrics.load(["brightness", "distance"])
    references = [noise(seed) for seed in range(3)]
    frames = [shifted(frame, 12288, by) for frame, by in zip(references, (2, 9, 4), strict=True)]
    entries = [{"index": index, "prompt": f"p{index}", "seed": 0} for index in range(3)]
    found = metrics.measure(loaded, entries, frames, references)
    bright, distance = found["brightness"], found["distance"]
    assert bright["difference"] == pytest.approx(5, abs=1e-5)
    assert bright["difference_error"] == pytest.approx(statistics.stdev((2, 9, 4)) / math.sqrt(3), abs=1e-5)
    assert bright["mean"] - bright["reference_mean"] == pytest.approx(5, abs=1e-5)
    assert bright["standard_error"] != bright["difference_error"]
    assert (bright["worst"]["index"], distance["worst"]["index"]) == (0, 1)
    assert distance["worst"]["difference"] == pytest.approx(9)
    assert entries[1]["metrics"]["distance"] == pytest.approx(9)
    assert "paired difference to the reference +5 ± 2.1" in metrics.sentence(bright)


def test_a_metric_is_measured_without_a_reference_too(package):
    entries = [{"index": 0, "prompt": "p", "seed": 0}]
    found = metrics.measure(metrics.load(["brightness"]), entries, [noise()], None)
    assert found["brightness"]["mean"] == pytest.approx(noise().mean(), abs=1e-5)
    assert "difference" not in found["brightness"]
    assert "reference_metrics" not in entries[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("brightnes", r"offers the metric 'brightnes'; did you mean 'brightness'\? \(installed: absent, brightness, "),
        ("psnr", "'psnr' is always measured against quality.reference; leave it out"),
    ],
)
def test_an_unknown_metric_is_refused_before_any_is_imported(package, name, sentence):
    with pytest.raises(UserError, match=sentence):
        metrics.check_names([name])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("absent", "the metric 'absent' cannot be loaded: the package no_such_module is missing"),
        ("number", "the metric 'number' .measures_of_others:number. is not a function"),
    ],
)
def test_a_metric_that_cannot_be_loaded_is_refused_by_a_dry_run(package, sglang, name, sentence):
    done = sglang("generate", "--prompt", "a lake", f"quality.metrics=[{name}]", "dry_run=true")
    assert (done.code, sentence.replace(".measures", "(measures").replace("number. is", "number) is") in done.err) == (
        2, True
    ), done.err  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("broken", "The metric 'broken' of sample 4 failed: "),
        ("infinite", "The metric 'infinite' of sample 4 is not finite: inf"),
    ],
)
def test_a_metric_that_fails_names_the_sample(package, name, sentence):
    with pytest.raises(RunError, match=sentence):
        metrics.measure(metrics.load([name]), [{"index": 4, "prompt": "p", "seed": 0}], [noise()], None)


@pytest.mark.parametrize(("level", "name"), [(0, "a black image"), (2, "a black image"), (128, "a constant image")])
def test_an_image_without_content_is_named_and_a_faint_one_is_not(level, name):
    flat = np.full((32, 32, 3), level, np.uint8)
    assert blank_images.fault(flat).startswith(name)
    hot = flat.copy()
    hot[3, 4] += 40  # one pixel
    assert blank_images.fault(hot) is None or blank_images.fault(hot).startswith(name)
    faint = flat.copy()
    faint[:, ::2, 0] += 3  # standard deviation 1.5
    assert blank_images.fault(faint) is None


SMALL = ("--prompt", "a lake", "--seed", "7", "--num-inference-steps", "1", "--height", "32", "--width", "32",
         "perf=light", "--perf-dump-path", "perf.json")  # fmt: skip


@pytest.mark.whole
def test_a_black_image_fails_a_run_that_asks_for_quality_and_leaves_its_dump(package, pipelines, sglang, monkeypatch):
    words = ("generate", "--model-path", pipelines["sd3"], *SMALL)
    assert sglang(*words, "--output-path", "reference").code == 0
    monkeypatch.setattr(judging.blank_images, "fault", lambda frame: "a black image: so it is")
    assert sglang(*words).code == 0
    done = sglang(*words, "quality.reference=reference", "quality.metrics=[brightness]")
    assert done.code == 1
    assert done.lines[-1] == "ERROR: The images are saved, but sample 0 is a black image: so it is"
    found = json.loads(Path("perf.json").read_text())["quality"]
    assert found["verdict"] == "identical"
    assert found["summary"]["brightness"]["difference"] == 0
    assert "Quality against reference: identical" in done.err
    assert "Quality, brightness: " in done.err


@pytest.mark.whole
def test_a_reference_without_content_fails_the_run_too(pipelines, sglang, monkeypatch):
    words = ("generate", "--model-path", pipelines["sd3"], *SMALL)
    assert sglang(*words, "--output-path", "reference").code == 0
    path = Path("reference/generated_image_0.png")
    with Image.open(path) as image:
        Image.new("RGB", image.size, (90, 90, 90)).save(path)
    done = sglang(*words, "quality.reference=reference")
    assert done.code == 1
    assert "saved, but the reference of sample 0 is a constant image: the standard deviation of its" in done.lines[-1]
