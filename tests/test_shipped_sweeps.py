"""The sweeps of sweeps/ as a user runs them: the embedded model, every cell a row, the table in the sweep's folder."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sglang_gen.launch import launcher
from sglang_gen.parallel.mesh import AXES

SWEEPS = Path(__file__).parent.parent / "sweeps"
STAGES = ("load", "text_encoding", "latents", "denoising", "decoding", "saving")
PICTURES = {"parallelism": 4, "interactions": 4}  # of each cell; one elsewhere
# Least PSNR in dB between a cell's pictures and those of the first: exact up to the order of sums.
EXACT = {"attention": 40.0, "compile": 40.0, "parallelism": 60.0}


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((left.astype(float) - right) ** 2), 1e-9)))


def pictures(row: dict[str, str]) -> list[np.ndarray]:
    return [np.asarray(Image.open(Path("sweep") / name)) for name in row["pictures"].split(" ")]


@pytest.fixture
def sweep(sglang):
    """Run a shipped sweep; its rows, every one completed with all that a row has, or refused with its reason."""

    def run(name: str, *words: str) -> list[dict[str, str]]:
        done = sglang("generate", "--config-dir", SWEEPS, "--config-name", name, "--output-path", "sweep", *words)
        with Path("sweep/table.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        failed = [row for row in rows if row["status"] != "completed"]
        assert done.code == 0, done.err
        assert all(row["status"] == "refused" and row["error"] for row in failed)
        for row in rows:
            if row not in failed:
                check_row(row, PICTURES.get(name, 1))
        check_markdown(rows, Path("sweep/table.md").read_text(encoding="utf-8"))
        return rows

    return run


def check_row(row: dict[str, str], count: int) -> None:
    """Overrides, seconds per stage and step with repeats and interval, memory, requested and effective, pictures."""
    assert row["overrides"]
    assert row["error"] == ""
    assert all(float(row[f"{stage}_s"]) >= 0 for stage in STAGES)
    assert row["repeats"] == "3"
    for name in ("denoising_s", "step_s", "total_s", "images_per_second"):
        assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
    assert float(row["peak_host_mb"]) > 0
    assert row["requested.device"] == "auto"
    assert row["effective.device"] != "auto"
    assert len(pictures(row)) == count


def check_markdown(rows: list[dict[str, str]], text: str) -> None:
    """A row for each job, the reason of each that failed, and lines of 120 columns or less."""
    assert all(len(line) <= 120 for line in text.splitlines())
    lines = [line for line in text.splitlines() if re.match(r"\| +\d+( r)? +\|", line)]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        assert ("x" if row["status"] == "completed" else row["status"]) in line
        assert row["status"] == "completed" or row["error"].partition(" ")[0] in text


def check_same_pictures(rows: list[dict[str, str]], least: float) -> None:
    first, *others = [row for row in rows if row["status"] == "completed"]
    for row in others:
        for left, right in zip(pictures(first), pictures(row), strict=True):
            assert psnr(left, right) >= least, row["overrides"]


@pytest.mark.slow
def test_the_attention_sweep_gives_the_same_picture_with_every_kernel_that_runs(sweep):
    rows = sweep("attention")
    done = {row["overrides"].partition("=")[2] for row in rows if row["status"] == "completed"}
    assert {"auto", "sdpa", "math"} <= done
    check_same_pictures(rows, EXACT["attention"])


@pytest.mark.slow
def test_the_cache_sweep_completes_and_every_cache_leaves_the_motif(sweep):
    rows = sweep("cache_dit")
    assert [row["status"] for row in rows] == ["completed"] * 5
    exact, *cached = [pictures(row)[0] for row in rows]
    assert all(30 < psnr(exact, picture) < 90 for picture in cached)


@pytest.mark.slow
def test_each_cache_gives_the_same_pictures_on_every_layout(sweep, pool, monkeypatch):
    monkeypatch.setattr(launcher, "open_ranks", pool.open)
    rows = sweep("parallel_cache", "--dtype", "float32", "--height", "64", "--width", "64")
    assert [row["status"] for row in rows] == ["completed"] * 24
    for number in range(4):
        check_same_pictures(rows[number::4], EXACT["parallelism"])


@pytest.mark.slow
def test_the_threshold_sweep_moves_away_from_the_exact_picture_as_the_threshold_grows(sweep):
    rows = sweep("cache_threshold")
    assert [row["status"] for row in rows] == ["completed"] * 10
    for part in (rows[:5], rows[5:]):
        careful, *_, bold = [pictures(row)[0] for row in part]
        assert 30 < psnr(careful, bold) < 60


@pytest.mark.slow
def test_the_interactions_sweep_has_a_cell_for_each_pair(sweep):
    """Without the second layout, whose ranks would take most of the time to start."""
    rows = sweep("interactions", "parallel=single", "sampling.num_inference_steps=10")
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"completed"}
    exact, *others = [pictures(row)[0] for row in rows]
    assert all(psnr(exact, picture) > 25 for picture in others)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_the_compile_sweep_keeps_the_picture(sweep):
    rows = sweep("compile")
    assert [row["status"] for row in rows] == ["completed"] * 3
    assert [row["effective.compile"] for row in rows] == ["false", "regional", "full"]
    check_same_pictures(rows, EXACT["compile"])


@pytest.mark.slow
def test_the_parallelism_sweep_gives_the_same_pictures_on_every_layout(sweep, pool, monkeypatch):
    """The jobs share their ranks, which would take most of the time to start."""
    monkeypatch.setattr(launcher, "open_ranks", pool.open)
    words = ("--dtype", "float32", "sampling.num_inference_steps=3")  # bfloat16 rounds to 35 to 45 dB
    rows = sweep("parallelism", *words)
    assert rows[0]["overrides"].startswith("parallel=single ")
    assert len(rows) == 10
    assert {row["status"] for row in rows} == {"completed"}
    check_same_pictures(rows, EXACT["parallelism"])
    degrees = [tuple(int(row[f"effective.parallel.{axis}"]) for axis in AXES) for row in rows]
    names = [row["overrides"].split(" ")[0].removeprefix("parallel=") for row in rows]
    assert dict(zip(names, degrees, strict=True)) == {
        "single": (1, 1, 1, 1, 1), "tp2": (1, 1, 1, 1, 2), "sp2": (1, 1, 1, 2, 1), "ulysses2": (1, 1, 1, 2, 1),
        "ring2": (1, 1, 2, 1, 1), "cfg2": (1, 2, 1, 1, 1), "dp2": (2, 1, 1, 1, 1), "usp4": (1, 1, 2, 2, 1),
        "sp2_tp2": (1, 1, 2, 1, 2), "cfg2_sp2": (1, 2, 1, 2, 1),
    }  # fmt: skip
