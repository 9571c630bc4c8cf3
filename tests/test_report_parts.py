"""The parts of a report: its verdict in words, its references and differences, its frontier, its image of the grid."""

import base64
import io
import json
import math
from pathlib import Path

import altair
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from sweep_folders import cache_and_guidance, dump, job, pixels

from sglang_gen.perf import quality
from sglang_gen.report import cells, grid_image, image_data
from sglang_gen.report.cell_metrics import frontier, metrics
from sglang_gen.report.cells import read_cells
from sglang_gen.report.conclusion import conclude, duration
from sglang_gen.report.gallery import items
from sglang_gen.report.grid_image import arranged, grid_png
from sglang_gen.report.image_data import amplification, embed, longest_side
from sglang_gen.report.page import axes, collect
from sglang_gen.report.setting_pairs import shared_and_own


def verdict(folder: Path, *times: list[float]) -> str:
    """The verdict on cells with these times, `x=0` first."""
    for index, seconds in enumerate(times):
        job(folder, f"x={index}", content=dump(seconds))
    found = conclude(metrics(read_cells([folder]), []), None)
    return " ".join([found.headline, *found.details])


VERDICTS = {
    "a clear winner": (
        [[1.0, 1.01, 0.99], [0.8, 0.81, 0.79]],
        "x=1 is fastest: 800 ms (769 to 831) per image. The next is x=0, which takes 25 % longer (95 % interval 22 to ",
    ),
    "a difference within the noise": (
        [[1.0, 1.2, 0.8], [0.95, 1.3, 0.75]],
        "Too noisy to tell which is fastest: x=1 and x=0. About 5890 repeats per cell would tell times that differ by ",
    ),
    "no difference": (
        [[1.0, 1.001, 0.999], [1.0, 1.0012, 0.9985]],
        "x=1 and x=0 are equally fast: 1.00 s (0.996 to 1.00) per image. Their times differ by less than 2 %.",
    ),
    "a single repeat": (
        [[1.0], [0.9]],
        "x=1 was fastest: 900 ms per image. Each cell was timed once, so this may be chance: the next is x=0, which "
        "takes 11 % longer. Repeat with perf.repeat=5.",
    ),
    "the first cell": (
        [[0.5, 0.501, 0.502], [1.0, 1.01, 0.99], [2.0, 2.1, 1.9]],
        "It is the first cell, the baseline of this sweep.",
    ),
    "a tie behind which the first cell is slow": (
        [[2.0, 2.01, 1.99], [1.0, 1.001, 0.999], [1.0, 1.0012, 0.9985]],
        "The lowest mean, that of x=2, is 2 times as fast as the first cell, x=0 (95 % interval 1.98 to 2.02).",
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_is_as_certain_as_the_times_allow(tmp_path, name):
    times, sentence = VERDICTS[name]
    assert sentence in verdict(tmp_path, *times)


def test_candidates_of_a_tuner_have_its_names_and_its_verdict(tmp_path):
    job(tmp_path, content=dump([1.0, 1.0]), label="base")
    job(tmp_path, "compile=full", "dtype=float32", content=dump([0.9, 0.9]), label="compile=full dtype=float32")
    assert [(cell.label, cell.short) for cell in read_cells([tmp_path])] == [
        ("base", "base"), ("compile=full dtype=float32", "compile=full dtype=float32")
    ]  # fmt: skip
    own = collect(read_cells([tmp_path])).conclusion.headline
    (tmp_path / "tune.json").write_text(json.dumps({"conclusion": ["Chosen: compile=full", "Tied with it: base"]}))
    stated = collect(read_cells([tmp_path])).conclusion
    assert (stated.headline, stated.details) == ("Chosen: compile=full.", ("Tied with it: base.",))
    (tmp_path / "tune.json").write_text("[]")  # of another program
    assert collect(read_cells([tmp_path])).conclusion.headline == own


def test_saving_and_loading_do_not_count(tmp_path):
    job(tmp_path, "x=0", content=dump([1.0, 1.0], images=2))
    (cell,) = read_cells([tmp_path])
    assert cell.seconds == pytest.approx([0.5, 0.5])


def test_a_sweep_in_which_nothing_completed_says_so(tmp_path):
    job(tmp_path, "x=0", error="2 ranks are not here")
    job(tmp_path, "x=1", status="interrupted")
    found = conclude(metrics(read_cells([tmp_path]), []), None)
    assert found.headline == "No cell completed, so there is nothing to compare."
    assert found.details == (
        "2 of 2 cells did not complete (1 failed and 1 interrupted); the table gives the reasons.",
    )


def test_the_frontier_holds_the_points_that_no_other_point_beats():
    points = [(3, 1), (1, 3), (2, 2), (2, 3), (4, 1), (1, 3), (0.5, 5)]
    assert frontier(points) == [6, 1, 5, 2, 0]
    assert frontier([]) == []
    assert frontier([(1, 1), (1, 0)]) == [1]


def test_images_are_compared_with_the_first_of_the_same_prompt_and_seed(tmp_path):
    for cache in ("none", "dbcache"):
        for brightness, seed in enumerate((7, 8)):
            content = dump([1.0, 1.01])
            content["samples"][0]["seed"] = seed
            job(tmp_path, f"cache={cache}", f"seed={seed}", content=content,
                images=[pixels(brightness + 10 * (cache != "none"))])  # fmt: skip
    cells = read_cells([tmp_path])
    shown = embed(items(cells))
    assert [one.is_reference for one in shown] == [True, True, False, False]
    assert [one.squared_error for one in shown[2:]] == pytest.approx([100, 100])
    found = metrics(cells, shown)
    assert [one.psnr for one in found] == pytest.approx([math.inf, math.inf, 28.13, 28.13], abs=0.01)
    assert found[2].ssim == pytest.approx(quality.ssim(pixels(10), pixels(0)))


def test_a_difference_map_is_the_largest_difference_of_the_channels(tmp_path):
    other = pixels()
    other[3, 5, 1] += 40
    for index, image in enumerate((pixels(), other)):
        job(tmp_path, f"x={index}", content=dump([1.0]), images=[image])
    difference = decoded(embed(items(read_cells([tmp_path])))[1].difference)
    assert difference.shape == (16, 24)
    assert difference[3, 5] == 40
    assert difference.sum() == 40


def decoded(uri: str | None) -> "np.ndarray":
    assert uri is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_images_of_another_seed_or_size_are_not_compared(tmp_path):
    seed = dump([1.0])
    seed["samples"][0]["seed"] = 99
    large = dump([1.0])
    large["effective"]["width"] = 48
    job(tmp_path, "x=0", content=dump([1.0]), images=[pixels()])
    job(tmp_path, "x=1", content=seed, images=[pixels()])
    job(tmp_path, "x=2", content=large, images=[pixels(width=48)])
    shown = embed(items(read_cells([tmp_path])))
    assert all(one.is_reference for one in shown)
    assert not any(one.difference for one in shown)


def test_the_comparison_of_the_run_itself_comes_first(tmp_path):
    exact = tmp_path / "exact"
    exact.mkdir()
    Image.fromarray(pixels(3)).save(exact / "generated_image_0.png")
    for index in range(2):
        entry = {"file": "generated_image_0.png", "reference": "generated_image_0.png"}
        stated = {"reference": str(exact), "psnr": 30.0 + index, "ssim": 0.9, "identical": False, "samples": [entry]}
        job(tmp_path / "sweep", f"x={index}", content=dump([1.0], quality=stated), images=[pixels(index)])
    cells = read_cells([tmp_path / "sweep"])
    shown = embed(items(cells))
    assert [one.squared_error for one in shown] == pytest.approx([9, 4])
    assert [(one.psnr, one.ssim, one.is_reference) for one in metrics(cells, shown)] == [
        (30.0, 0.9, False), (31.0, 0.9, False),
    ]  # fmt: skip


def test_many_large_images_make_no_page_of_hundreds_of_megabytes(tmp_path, monkeypatch):
    assert longest_side(1) == 512
    assert longest_side(100) == 489
    assert 10_000 * longest_side(10_000) ** 2 < 100_000_000
    monkeypatch.setattr(image_data, "PIXELS", 40_000)
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    for index in range(4):
        job(tmp_path, f"x={index}", content=dump([1.0]), images=[noise - index])
    shown = embed(items(read_cells([tmp_path])))
    assert [one.shown for one in shown] == [(100, 75)] * 4
    assert all(one.size == (400, 300) for one in shown)
    assert sum(len(one.data or "") + len(one.difference or "") for one in shown) < 300_000


def test_a_large_file_is_embedded_as_webp_and_a_small_one_without_loss(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    job(tmp_path, "x=0", content=dump([1.0]), images=[noise])
    job(tmp_path, "x=1", content=dump([1.0]), images=[pixels()])
    large, small = embed(items(read_cells([tmp_path])))
    assert large.data is not None
    assert large.data.startswith("data:image/webp;")
    assert (decoded(small.data) == pixels()).all()


def test_the_amplification_makes_the_median_difference_visible(tmp_path):
    for index, brightness in enumerate((0, 3, 10, 60)):
        job(tmp_path, f"x={index}", content=dump([1.0]), images=[pixels(brightness)])
    assert amplification(embed(items(read_cells([tmp_path])))) == 16  # 16 * 10 <= 255 < 32 * 10
    assert amplification([]) == 1


def test_the_grid_has_two_keys_unless_the_cells_do_not_fill_it():
    assert axes({"cache": ["a", "b"], "seed": ["1", "2", "3"]}, 6) == ("cache", "seed")
    assert axes({"cache": ["a", "b"]}, 2) == (None, "cache")
    assert axes({}, 1) == (None, None)
    values = [str(index) for index in range(20)]
    assert axes({"x": values, "y": values}, 20) == (None, None)
    assert axes({"x": [str(index) for index in range(50)]}, 50) == (None, None)


def test_the_image_of_the_grid_has_a_row_for_each_combination_and_labels(tmp_path):
    content = collect(read_cells([cache_and_guidance(tmp_path)]))
    layout = arranged(content.shown)
    assert layout.headings == ["cache=none", "cache=dbcache"]
    assert layout.titles == ["guidance=3", "guidance=7.5"]
    assert [[tile is not None for tile in row] for row in layout.rows] == [[True, True], [True, True]]
    data = grid_png(content.shown)
    assert data is not None
    image = Image.open(io.BytesIO(data))
    assert image.text["Software"] == "sglang-gen report"
    assert 400 < image.width < 500
    dark = np.asarray(image.convert("L"))[:46] < 128  # the headings
    assert dark.any()


def test_an_image_of_the_grid_without_columns_names_every_tile(tmp_path):
    for index in range(30):
        job(tmp_path, f"x={index}", content=dump([1.0]), images=[pixels(index)])
    layout = arranged(embed(items(read_cells([tmp_path]))))
    assert layout.captions
    assert [len(row) for row in layout.rows] == [7, 7, 7, 7, 2]


def test_settings_are_shared_unless_cells_that_can_have_them_differ(tmp_path):
    shared, own = shared_and_own(read_cells([cache_and_guidance(tmp_path)]))
    names = {setting.name: setting for setting in shared}
    assert names["attention"].changed
    assert not names["scheduler_config.shift"].changed
    assert names["cache.fn"].value == "1"  # the cells without a cache cannot have it
    assert set(own) == {"cache"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((0.1234,), "123 ms"),
        ((1.5, 1.25, 1.75), "1.50 s (1.25 to 1.75)"),
        ((75.0,), "75.0 s"),
        ((0.00012,), "0.120 ms"),
    ],
)
def test_times_have_three_digits_and_one_unit(seconds, text):
    assert duration(*seconds) == text


@pytest.mark.whole
def test_every_plot_is_valid_vega_lite(tmp_path):
    content = collect(read_cells([cache_and_guidance(tmp_path)]))
    plots = [*content.stages, *content.pareto, content.cache]
    assert len(plots) == 9
    for plot in plots:
        altair.LayerChart.from_dict(plot.spec, validate=True)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("threshold=0.16", "threshold=0.16"),
        ("residual_diff_threshold=0.16", "residual...old=0.16"),
        ("a" * 19, "a" * 19),
    ],
)
def test_a_long_name_keeps_its_last_characters_where_the_names_of_cells_differ(text, short):
    assert cells.without_middle(text, 19) == short
    assert len(short) <= 19


def test_names_in_a_grid_keep_their_last_characters():
    draw, font = ImageDraw.Draw(Image.new("RGB", (4, 4))), ImageFont.load_default()
    name = "residual_diff_threshold=0.0001"
    fitted = grid_image._fitted(draw, name, int(draw.textlength(name, font)) - 20, font)
    assert fitted.endswith("0.0001")
    assert "..." in fitted
    assert draw.textlength(fitted, font) <= draw.textlength(name, font) - 20
    assert grid_image._fitted(draw, name, 1000, font) == name
