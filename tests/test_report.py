"""The report of a sweep: what its page shows of the jobs' folders, and what it never does."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import PROMPT, cache_and_guidance, dump, job, pixels

from sglang_gen.report import bar_plots, cell_metrics, scatter_plots, vega_scripts
from sglang_gen.report.cells import read_cells
from sglang_gen.report.write import write_report

pytestmark = pytest.mark.usefixtures("reports")
BUNDLE = vega_scripts.bundle
SCRIPT = "window.vegaEmbed = () => Promise.resolve();"


@pytest.fixture(autouse=True, scope="module")
def _short_script():
    """The scripts of Vega take seconds to bundle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vega_scripts, "bundle", lambda: SCRIPT)
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory, _short_script) -> "Page":
    """The page of two caches by two guidance scales, of which one cell failed."""
    return written(cache_and_guidance(tmp_path_factory.mktemp("sweeps") / "caches"))


class Page(HTMLParser):
    """What a browser reads of a page: elements with their attributes, text, scripts and data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._within = ""
        self.feed(self.source)
        self.data: dict[str, Any] = json.loads(self.scripts[0])
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        self._within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts[-1] += data
        elif self._within != "style":
            self.words.append(data)

    def all(self, tag: str, name: str = "") -> list[dict[str, str]]:
        return [
            found
            for element, found in self.elements
            if element == tag and (not name or name in found.get("class", "").split())
        ]

    def section(self, name: str) -> bool:
        return any(found.get("id") == name for found in self.all("section"))


def written(*folders: Path) -> Page:
    return Page(write_report(folders)[0])


def test_a_page_says_which_cell_is_fastest_by_how_much_and_at_which_quality(page):
    headline = re.search(r"<h1>(.*)</h1>", page.source)[1]
    assert headline == "dbcache\u00a0·\u00a03 is fastest: 500 ms (484 to 516) per image."
    assert "The next is none · 3, which takes 2 times as long (95 % interval 1.96 to 2.05)." in page.text
    assert "Its images have 36.1 dB PSNR, SSIM 0.9992 against the reference." in page.text
    assert "Its peak of host memory is 350 MiB." in page.text
    assert "1 of 4 cells did not complete (1 failed): memory ran out." in page.text


def test_the_grid_knows_the_place_of_every_image_and_a_cell_without_one_shows_its_reason(page):
    assert page.data["keys"] == [{"name": "cache", "values": ["none", "dbcache"]},
                                 {"name": "guidance", "values": ["3", "7.5"]}]  # fmt: skip
    assert page.data["items"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert (page.data["columns"], page.data["rows"]) == (0, 1)
    assert len(page.all("figure", "item")) == 4
    assert len(page.all("img", "made")) == 3
    assert len(page.all("img", "difference")) == 2
    assert [found["href"] for found in page.all("a")] == [f"{index}/generated_image_0.png" for index in range(3)]
    assert "failed memory ran out" in page.text


def test_plots_show_stages_with_intervals_trade_offs_with_their_frontier_and_the_decisions_of_the_cache(page):
    assert [found for found in ("stages", "trade-offs", "cache", "absent") if page.section(found)] == [
        "stages", "trade-offs", "cache",
    ]  # fmt: skip
    labels = [found["aria-label"] for found in page.all("div", "chart")]
    assert labels == ["Generation", "Load", "Text encoding", "Denoising", "Decoding", "Saving", "Time and quality",
                      "Time and memory", "Decisions"]  # fmt: skip
    plots = dict(zip(labels, page.data["plots"], strict=True))
    denoising = plots["Denoising"]["data"]["values"]
    assert [row["value"] for row in denoising] == pytest.approx([800, 808, 400])
    assert denoising[0]["low"] < 800 < denoising[0]["high"]
    assert "low" not in plots["Load"]["data"]["values"][0]
    quality = rows_of(plots["Time and quality"])
    best = {row["short"] for row in quality if row.get("frontier")}
    assert best == {"none\u00a0·\u00a03", "dbcache\u00a0·\u00a03"}
    decisions = rows_of(plots["Decisions"])
    assert [row["decision"] for row in decisions if "decision" in row] == ["computed", "reused", "computed", "reused"]


def test_the_strip_of_a_step_cache_shows_all_images_and_branches(tmp_path):
    reused = {0: set(), 1: {1, 3}, 2: {1, 2, 3}}
    trace = [
        {"step": step, "image": image, "branch": branch, "decision": "reused" if step in reused[image] else "computed",
         "residual": None if step == 0 else 0.01 * (image + 1), "threshold": 0.1}
        for image in reused for step in range(4) for branch in ("conditional", "unconditional")
    ]  # fmt: skip
    cache = {"steps": ["compute"] * 4, "reused": 0, "residual_diffs": {}, "trace": trace}
    job(tmp_path, "cache=dbcache", content=dump([1.0], cache=cache), images=[pixels()])
    plot = bar_plots.cache_plot(read_cells([tmp_path]))
    rows = rows_of(plot.spec)
    strip = [(row["decision"], row["share"], row["change"]) for row in rows if "decision" in row]
    assert strip == [
        ("computed", "0 of 6 images and guidance branches", "not measured"),
        ("in part", "4 of 6 images and guidance branches", "0.01 to 0.03"),
        ("in part", "2 of 6 images and guidance branches", "0.01 to 0.03"),
        ("in part", "4 of 6 images and guidance branches", "0.01 to 0.03"),
    ]
    assert {row["text"] for row in rows if "text" in row} == {"42% of 4 steps reused"}


def test_a_cell_that_is_much_slower_leaves_the_others_apart_and_names_do_not_cover_one_another(tmp_path):
    for label, seconds, mean in (("a", [0.9, 1.1], 100), ("b", [1.01], 101), ("c", [2.0], 130), ("slow", [40.0], 131)):
        quality = {"samples": [{"index": 0, "psnr": float(mean), "ssim": 1.0}], "psnr": float(mean), "ssim": 1.0}
        job(tmp_path, f"cache={label}", content=dump(seconds, quality=quality), images=[pixels()])
    plot = scatter_plots.quality_plot(cell_metrics.metrics(read_cells([tmp_path]), []))
    assert plot is not None
    axes = [layer["encoding"]["x"] for layer in plot.spec["layer"] if "axis" in layer["encoding"].get("x", {})]
    assert {axis["scale"]["type"] for axis in axes} == {"log"}
    assert axes[0]["axis"]["values"] == [1.0, 2.0, 5.0, 10.0, 20.0]
    lows = [row["low"] for row in rows_of(plot.spec) if "low" in row]
    assert min(lows) == pytest.approx(0.5)  # the interval of two repeats that differ begins at 0
    texts = [layer for layer in plot.spec["layer"] if layer["mark"]["type"] == "text"]
    named = [row["cell"] for layer in texts for row in layer["data"]["values"]]
    assert named == ["cache=a", "cache=c", "cache=slow"]


def rows_of(plot: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for layer in plot["layer"] for row in layer.get("data", plot.get("data", {})).get("values", ())]


def test_the_table_says_constants_once_and_marks_what_took_effect_instead(page):
    header = re.findall(r'<th scope="col">(.*)</th>', page.source)
    assert header == ["job", "cache", "guidance", "status", "time per image", "speed-up", "step, median", "step, mean",
                      "peak host memory", "PSNR", "SSIM", "whole job"]  # fmt: skip
    assert page.source.count("auto → <b>sdpa</b>") == 1
    assert page.source.count(f"<dd>{PROMPT}</dd>") == 1
    assert "A processor, cores: 8, threads: 4" in page.text
    assert "0123456789" in page.text
    assert '<td class="reason" colspan="8">memory ran out</td>' in page.source


HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"`${x}&amp;\u2028\u202e -->"


def test_text_of_users_stays_text(tmp_path):
    sweep = tmp_path / "a<b>&'\"sweep"
    for index in range(2):
        content = dump([1.0, 1.1], prompt=HOSTILE, effective={"width": 24, "height": 16, HOSTILE: HOSTILE, "x": index})
        content["meta"]["model"] = content["machine"]["cpu"] = HOSTILE
        job(sweep, f"tag={HOSTILE}{index}", content=content, images=[pixels(index)])
    job(sweep, f"tag={HOSTILE}2", error=HOSTILE)
    page = written(sweep)
    assert len(page.scripts) == 3
    assert page.scripts[1] == SCRIPT
    assert "x" not in [found.get("src") for found in page.all("img")]
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    assert page.text.count("</script><script>alert(1)</script>") >= 4
    assert page.data["keys"][0]["values"][0].startswith("</script>")
    assert "\u2028" not in page.scripts[0]
    csp = next(found["content"] for found in page.all("meta") if found.get("http-equiv") == "Content-Security-Policy")
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in csp
    assert csp.startswith("default-src 'none'; img-src data:;")
    assert "'unsafe-inline'" not in csp.partition("script-src")[2]


def test_a_page_loads_nothing(page):
    sources = [found["src"] for _, found in page.elements if "src" in found]
    assert len(sources) == 5
    assert all(source.startswith("data:image/") for source in sources)
    assert not page.all("link")
    assert not re.search(r"@import|url\(", page.source)


def test_a_dry_run_has_a_page_without_images_and_plots_that_says_why(tmp_path):
    for seed in range(3):
        job(tmp_path, f"seed={seed}", "dry_run=true", status="planned")
    paths = write_report([tmp_path])
    assert [path.name for path in paths] == ["report.html"]
    page = Page(paths[0])
    assert "<h1>Nothing was run: all 3 cells were planned only (dry_run=true).</h1>" in page.source
    assert not any(page.section(name) for name in ("images", "stages", "trade-offs", "cache"))
    assert "Stage times: no cell was measured." in page.text
    assert "Images: no cell generated an image" in page.text
    assert SCRIPT not in page.source


def test_a_sweep_of_one_cell_has_a_page(tmp_path):
    job(tmp_path, "seed=1", content=dump([1.0]), images=[pixels()])
    page = written(tmp_path)
    assert "<h1>job 0 takes 1.00 s per image; no other cell was measured.</h1>" in page.source
    assert page.section("stages")
    assert not page.section("trade-offs")
    assert "Time and quality: only one cell was measured." in page.text
    assert "Differences: no two images" in page.text


def test_images_of_random_weights_have_no_quality(tmp_path):
    for index in range(2):
        content = dump([1.0 + index, 1.1 + index])
        content["effective"]["model"] = {"weights": "random"}
        job(tmp_path, f"x={index}", content=content, images=[pixels(index)])
    page = written(tmp_path)
    assert "<dt>weights</dt><dd>random</dd>" in page.source
    assert "Time and quality: the weights are random, so images mean nothing." in page.text
    assert "Time and memory" in [found["aria-label"] for found in page.all("div", "chart")]
    assert "PSNR</th>" not in page.source


def test_jobs_without_note_or_dump_and_damaged_images_are_said_to_be_so(tmp_path):
    job(tmp_path, "seed=1", content=dump([1.0]), images=[b"no image"])
    (tmp_path / "1").mkdir()
    job(tmp_path, "seed=2", status="completed", files=["generated_image_0.png"], images=[pixels()])
    page = written(tmp_path)
    assert "generated_image_0.png cannot be read: its format is unknown, or it is damaged" in page.text
    assert "job.json is missing" in page.text
    assert "perf.json is missing" in page.text


def test_videos_and_sounds_are_embedded_where_small_and_linked_otherwise(tmp_path):
    for name, size in (
        ("generated_video_0.mp4", 100),
        ("generated_video_0.mp4", 3_000_000),
        ("generated_audio_0.wav", 9),
    ):
        job(tmp_path, f"x={size}", content=dump([1.0, 1.1]), files=[name], images=[bytes(size)])
    page = written(tmp_path)
    assert [found["src"][:15] for found in page.all("video")] == ["data:video/mp4;"]
    assert [found["src"][:15] for found in page.all("audio")] == ["data:audio/wav;"]
    assert "generated_video_0.mp4 has 3.0 MB and is linked, not embedded" in page.text
    assert [found["href"] for found in page.all("a", "missing")] == ["1/generated_video_0.mp4"]


def test_several_sweeps_are_compared_in_one_report(tmp_path):
    for name, seconds in (("old", 1.0), ("new", 0.5)):
        for seed in (1, 2):
            job(tmp_path / name, f"seed={seed}", content=dump([seconds, 1.01 * seconds]), images=[pixels(seed)])
    page = written(tmp_path / "old", tmp_path / "new")
    assert page.data["keys"][0] == {"name": "sweep", "values": ["old", "new"]}
    assert "Sweeps old, new, 4 cells." in page.text
    assert [found["href"] for found in page.all("a")][2] == "../new/0/generated_image_0.png"


def test_files_outside_of_a_job_are_not_shown(tmp_path):
    job(tmp_path / "sweep", "x=0", content=dump([1.0]), images=[pixels()])
    (tmp_path / "secret.png").write_bytes((tmp_path / "sweep/0/generated_image_0.png").read_bytes())
    note = json.loads((tmp_path / "sweep/0/job.json").read_text())
    (tmp_path / "sweep/0/job.json").write_text(json.dumps({**note, "files": ["../../secret.png"]}))
    assert not written(tmp_path / "sweep").all("img")


def test_each_image_of_a_job_has_its_place_in_the_grid(tmp_path):
    for cache in ("none", "dbcache"):
        job(tmp_path, f"cache={cache}", content=dump([1.0], images=2), images=[pixels(), pixels(9)])
    page = written(tmp_path)
    assert page.data["keys"][1] == {"name": "image", "values": ["0, seed 7", "1, seed 8"]}
    assert page.data["items"] == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.whole
def test_only_a_report_is_replaced(tmp_path, sglang):
    sweep = cache_and_guidance(tmp_path / "sweep")
    for _ in range(2):
        done = sglang("report", sweep)
        assert (done.code, done.lines) == (0, [f"INFO: Report saved to: {sweep}/report.html",
                                               f"INFO: Report saved to: {sweep}/grid.png"])  # fmt: skip
    for name in ("mine.html", "grid.png"):
        place = tmp_path / name[:4] / name
        place.parent.mkdir()
        place.write_bytes(b"mine")
        done = sglang("report", sweep, "--output", place.with_name("mine.html"))
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert f"{place} exists and is not a report" in done.err
        assert place.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "The folder nowhere does not exist; give the folder of a sweep"),
        (["."], "The folder . holds no job of a sweep"),
        (["sweep", "sweep/"], "sglang report: a folder is given twice"),
        (["sweep", "--output", "x/grid.png"], "--output names the page, and grid.png is the image beside it"),
        (["sweep", "--output", "sweep"], "--output must name a file, and sweep is a folder"),
        (["sweep", "--outptu=x.html"], "Unknown option --outptu; did you mean '--output'?"),
        (["--output", "x.html"], "sglang report needs the folder of a sweep"),
        ([""], "must be paths, not ''"),
    ],
)
def test_a_report_that_cannot_be_written_is_one_sentence(sglang, words, sentence):
    Path("sweep").mkdir()
    done = sglang("report", *words)
    assert (done.code, len(done.lines)) == (2, 1)
    assert sentence in done.err


def test_without_the_extra_the_command_says_how_to_install_it(tmp_path, sglang, monkeypatch):
    monkeypatch.setattr(vega_scripts, "missing", lambda: ["altair", "vl-convert-python"])
    done = sglang("report", cache_and_guidance(tmp_path))
    assert (done.code, done.lines) == (
        2,
        ["ERROR: A report needs altair and vl-convert-python: pip install 'sglang-gen[report]'"],
    )


def test_the_help_of_the_command_names_its_options(sglang):
    done = sglang("report", "--help")
    assert done.code == 0
    assert done.out.startswith("usage: sglang report DIR [DIR ...] [--output FILE]")
    assert sglang("report").code == 2


TINY = ("--prompt", "a", "--seed", "1", "--height", "32", "--width", "32", "--num-inference-steps", "2",
        "perf.work=false", "perf.machine_rates=false")  # fmt: skip


@pytest.mark.whole
def test_a_sweep_ends_with_its_report_whose_scripts_are_small(pipelines, sglang, monkeypatch):
    monkeypatch.setattr(vega_scripts, "bundle", BUNDLE)
    done = sglang("generate", "--model-path", pipelines["sd3"], *TINY, "--output-path", "sweep", "-m",
                  "sampling.guidance_scale=2,5", "perf.repeat=2")  # fmt: skip
    assert done.code == 0, done.err
    assert [line for line in done.lines if "Report" in line] == [
        "INFO: Report of the sweep saved to: sweep/report.html", "INFO: Report of the sweep saved to: sweep/grid.png",
    ]  # fmt: skip
    page = Page(Path("sweep/report.html"))
    assert len(page.all("img", "made")) == 2
    assert page.data["keys"] == [{"name": "guidance_scale", "values": ["2", "5"]}]
    assert 100_000 < sum(map(len, page.scripts)) < 1_500_000
    assert "vegaEmbed" in page.scripts[1]
    assert len(page.scripts[1]) == len(vega_scripts.bundle())  # kept in the cache folder


@pytest.mark.whole
@pytest.mark.parametrize(("words", "sentence"), [
    ((), "INFO: For a report of the sweep with plots: pip install 'sglang-gen[report]', then sglang report sweep"),
    (("hydra.callbacks.table.report=false",), None),
])  # fmt: skip
def test_a_sweep_without_a_report_ends_well(sglang, monkeypatch, words, sentence):
    monkeypatch.setattr(vega_scripts, "missing", lambda: ["altair"])
    done = sglang(
        "generate", "--prompt", "a", "--output-path", "sweep", "-m", "dry_run=true", "sampling.seed=1,2", *words
    )
    assert done.code == 0, done.err
    assert [line for line in done.lines if "eport" in line] == ([sentence] if sentence else [])
    assert not Path("sweep/report.html").exists()


@pytest.mark.whole
def test_a_report_that_cannot_be_written_is_one_line_and_changes_no_exit_code(sglang):
    Path("sweep").mkdir()
    Path("sweep/report.html").write_text("mine")
    done = sglang("generate", "--prompt", "a", "--output-path", "sweep", "-m", "dry_run=true", "sampling.seed=1,2")
    assert done.code == 0, done.err
    (line,) = [line for line in done.lines if "eport" in line]
    assert line.startswith(
        "ERROR: The report of the sweep could not be written: sweep/report.html exists and is not a "
    )
    assert Path("sweep/report.html").read_text() == "mine"


def predicted(reason: str | None = None, **ratios: float) -> dict[str, Any]:
    entries = {name: {"predicted": 1.0, "measured": ratio, "ratio": ratio} for name, ratio in ratios.items()}
    missing = {"predicted": None, "measured": 2.0, "ratio": None, "reason": reason}
    return {"rates": {}, **entries, **({"step_ms": missing} if reason else {})}


def test_a_page_shows_measurements_divided_by_their_predictions_and_why_there_are_none(tmp_path):
    sweep = tmp_path / "sweep"
    ranks = [{"rank": 0, "predicted": predicted(memory_mb=1.05, step_ms=1.1, flops=1.0)},
             {"rank": 1, "predicted": predicted(memory_mb=0.9, step_ms=1.0, flops=1.0)}]  # fmt: skip
    job(sweep, "x=0", content=dump([1.0, 1.1], ranks=ranks))
    job(sweep, "x=1", content=dump([1.0, 1.1], predicted=predicted("not <b>known</b>", memory_mb=1.04)))
    job(sweep, "x=2", content=dump([1.0, 1.1]))  # of an older version
    page = written(sweep)
    assert page.section("predictions")
    rows = re.search(r'<section id="predictions">.*?</section>', page.source, re.DOTALL)[0]
    assert re.findall(r'<th scope="col" class="number">(.*)</th>', rows) == ["memory", "step", "FLOPs"]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr><td>.*</tr>", rows)]
    assert cells == [["x=0", "0.90", "1.10", "1.00"], ["x=1", "1.04", "", ""]]
    assert "Step: not &lt;b&gt;known&lt;/b&gt;." in rows


def test_a_page_of_dumps_without_predictions_has_no_section_for_them(page):
    assert not page.section("predictions")
