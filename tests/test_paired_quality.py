"""`sglang perf compare` of two runs over the same samples: the paired difference of each measure."""

import json
import statistics
from pathlib import Path

import pytest

from sglang_gen.errors import InvalidValueError
from sglang_gen.perf.paired_quality import by_sample, compare_quality


def quality(psnrs: list[float | None], first: int = 0) -> dict:
    samples = [
        {"index": index, "prompt": f"p{first + index}", "seed": 1, "psnr": psnr, "ssim": 0.9, "max_error": 5,
         "metrics": {"brightness": 100.0 + index * (psnr or 0)}}
        for index, psnr in enumerate(psnrs)
    ]  # fmt: skip
    return {"verdict": "approximate", "samples": samples}


def test_the_error_of_a_paired_difference_is_not_that_of_the_means():
    base, new = [30.0, 40.0, 50.0, 60.0], [31.0, 42.0, 51.0, 62.0]
    rows, notes = compare_quality([{}, by_sample(quality(base))], [by_sample(quality(new))])
    psnr = next(row for row in rows if row.measure == "psnr")
    assert [row.measure for row in rows] == ["psnr", "ssim", "max_error", "brightness"]
    assert (psnr.images, psnr.base, psnr.new, psnr.difference) == (4, 45.0, 46.5, 1.5)
    assert psnr.standard_error == pytest.approx(statistics.stdev([1, 2, 1, 2]) / 2, abs=1e-6)
    assert notes == []


def test_images_that_are_identical_to_their_reference_are_left_out_of_psnr():
    rows, notes = compare_quality([by_sample(quality([30.0, None]))], [by_sample(quality([33.0, 40.0]))])
    psnr = rows[0]
    assert (psnr.images, psnr.difference, psnr.standard_error) == (1, 3.0, None)
    assert rows[1].images == 2
    assert notes == ["no psnr for 1 of 2 images: identical to their reference are 1 of base"]


@pytest.mark.parametrize(
    ("base", "new", "sides"),
    [
        ([None, None], [44.75, 40.0], "2 of 2 images: identical to their reference are 2 of base"),
        ([44.75, 40.0], [None, 41.0], "1 of 2 images: identical to their reference are 1 of new"),
        ([None, 40.0], [None, None], "2 of 2 images: identical to their reference are 1 of base and 2 of new"),
        ([None], [None], "1 of 1 image: identical to their reference are 1 of base and 1 of new"),
    ],
)
def test_the_note_says_whose_images_are_identical(base, new, sides):
    assert compare_quality([by_sample(quality(base))], [by_sample(quality(new))])[1] == [f"no psnr for {sides}"]


def test_a_measure_that_is_no_number_or_that_one_image_lacks_is_no_crash():
    odd = quality([30.0, 31.0])
    odd["samples"][1].pop("psnr")
    rows, _ = compare_quality([by_sample(odd)], [by_sample(quality([30.0, 31.0]))])
    assert [row.measure for row in rows] == ["ssim", "max_error", "brightness"]
    for value in ("30", True, [30]):
        with pytest.raises(InvalidValueError, match=r"the measure psnr of an image is .*, not a number"):
            by_sample({"samples": [{"psnr": value}]})


def test_runs_over_other_samples_are_not_compared():
    found = compare_quality([by_sample(quality([30.0]))], [by_sample(quality([30.0], first=5))])
    assert found == ([], ["the quality is not compared: the two sides have different samples"])
    assert compare_quality([{}], [by_sample(quality([30.0]))]) == ([], [])


def test_the_report_shows_the_paired_differences(sglang):
    for name, psnrs in (("base", [30.0, 40.0]), ("new", [29.0, 37.0])):
        dump = {"total_duration_ms": 100.0, "steps": [], "meta": {"model": "m", "prompt": "p"}, "schema_version": 1,
                "quality": quality(psnrs), "fingerprint": {"hash": "a", "fields": {}}}  # fmt: skip
        Path(f"{name}.json").write_text(json.dumps(dump))
    done = sglang("perf", "compare", "base.json", "new.json", "--json", "report.json")
    assert done.code == 0, done.err
    assert "| psnr | 2 | 35 | 33 | -2 ± 1 |" in done.out
    (comparison,) = json.loads(Path("report.json").read_text())["comparisons"]
    assert comparison["quality"][0] == {
        "measure": "psnr", "images": 2, "base": 35.0, "new": 33.0, "difference": -2.0, "standard_error": 1.0
    }  # fmt: skip
