"""The table of a sweep: what each job left behind, the callback that writes it, and the sweeps that are shipped."""

import csv
import errno
import io
import json
import math
import os
import statistics
from pathlib import Path

import pytest
import yaml

from sglang_gen import env
from sglang_gen.config import compose
from sglang_gen.config.choices import Choices
from sglang_gen.errors import UserError
from sglang_gen.perf.dump_numbers import measure
from sglang_gen.report import job_reader
from sglang_gen.sweep import multirun
from sglang_gen.sweep.table import to_csv, to_markdown

SWEEPS = Path(__file__).parent.parent / "sweeps"
TABLE = "++hydra.callbacks.table._target_=sglang_gen.sweep.callback.SweepTable"
TINY = ("--prompt", "a", "--seed", "1", "--height", "32", "--width", "32", "--num-inference-steps", "1",
        "perf.work=false", "perf.machine_rates=false")  # fmt: skip
CELLS = {
    "attention": 9, "cache_dit": 5, "cache_threshold": 10, "compile": 3, "interactions": 16, "parallel_cache": 24,
    "parallelism": 10,
}  # fmt: skip


def observation(milliseconds: float) -> dict:
    return {
        "total_duration_ms": 10 * milliseconds,
        "steps": [{"name": "denoising", "duration_ms": 8 * milliseconds}],
        "denoise_steps_ms": [{"step": step, "duration_ms": milliseconds + step, "batch": 0} for step in range(3)],
    }


def dump(milliseconds: float = 100.0, **changes: object) -> dict:
    memory = {"peak_allocated_mb": None, "peak_host_anon_mb": milliseconds}
    return {
        **observation(milliseconds),
        "steps": [{"name": "load", "duration_ms": 500.0}, *observation(milliseconds)["steps"]],
        "memory_checkpoints": {"load": memory, "denoising": {**memory, "peak_host_anon_mb": 2 * milliseconds}},
        "samples": [{"file": "generated_image_0.png"}],
        "images_per_second": 1.0,
        "requested": {"attention": "auto", "dtype": "float32", "parallel": {"num_gpus": 1}},
        "effective": {"attention": "sdpa", "dtype": "float32", "parallel": {"tp": 1}, "scheduler": {"shift": 3.0}},
        "quality": None,
        **changes,
    }


def job(folder: Path, name: str, content: dict | None, *overrides: str, **note: object) -> None:
    place = folder / name
    place.mkdir(parents=True)
    files = ["generated_image_0.png"] if content else []
    whole = {"schema_version": 1, "overrides": overrides, "status": "completed", "error": None, "seconds": 2.5,
             "files": files, **note}  # fmt: skip
    (place / "job.json").write_text(json.dumps(whole), "utf-8")
    if content:
        (place / "perf.json").write_text(json.dumps(content), "utf-8")
        (place / "generated_image_0.png").write_bytes(b"")


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(job_reader.read_jobs(folder)), newline="")))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_times_memory_and_pictures_of_its_job(tmp_path):
    job(tmp_path, "0", dump(), "sampling.num_inference_steps=3", "sampling.prompt='a, b'")
    (row,) = table(tmp_path)
    assert (row["job"], row["status"], row["error"], row["seconds"]) == ("0", "completed", "", "2.5")
    assert row["overrides"] == "sampling.num_inference_steps=3 'sampling.prompt='\"'\"'a, b'\"'\"''"
    assert row["pictures"] == "0/generated_image_0.png"
    assert (row["load_s"], row["denoising_s"], row["step_s"], row["total_s"]) == ("0.5", "0.8", "0.101", "1.0")
    assert (row["step_s_low"], row["step_s_high"], row["repeats"]) == ("", "", "1")
    assert (row["images_per_second"], row["peak_host_mb"], row["peak_device_mb"]) == ("1.0", "200.0", "")


def test_repeats_give_a_median_and_its_interval(tmp_path):
    values = [100.0, 102.0, 104.0, 110.0, 99.0]
    job(
        tmp_path,
        "0",
        dump(repeats=[observation(value) for value in values], quality={"psnr": 40.5, "ssim": 0.99, "max_error": 3}),
    )
    (row,) = table(tmp_path)
    half = 2.776 * 1.2533141 * statistics.stdev(values) / 5**0.5 / 1000
    assert float(row["step_s"]) == pytest.approx(0.103)
    assert float(row["step_s_low"]) == pytest.approx(0.103 - half, abs=2e-6)
    assert float(row["step_s_high"]) == pytest.approx(0.103 + half, abs=2e-6)
    assert (row["repeats"], row["load_s"], row["load_s_low"]) == ("5", "0.5", "")
    assert float(row["images_per_second"]) == pytest.approx(1 / 1.02, abs=1e-6)
    assert (row["psnr"], row["ssim"], row["max_error"]) == ("40.5", "0.99", "3")
    text = to_markdown(job_reader.read_jobs(tmp_path))
    assert f"| 103.0 ± {1000 * half:.1f} |" in text


def test_the_energy_of_an_image_is_the_median_over_the_repeats(tmp_path):
    joules = [500.0, 520.0, 510.0]
    repeats = [observation(100.0) | {"energy_j": value} for value in joules]
    job(tmp_path, "0", dump(repeats=repeats, samples=[{"file": "generated_image_0.png"}, {"file": "b.png"}]))
    job(tmp_path, "1", dump(repeats=[observation(100.0) | {"energy_j": None}]))
    job(tmp_path, "2", dump())  # of an earlier version
    told, silent, old = table(tmp_path)
    half = 4.303 * 1.2533141 * statistics.stdev([value / 2 for value in joules]) / 3**0.5
    assert float(told["joules_per_image"]) == 255.0
    assert float(told["joules_per_image_low"]) == pytest.approx(255 - half, abs=1e-3)
    assert (silent["joules_per_image"], old["joules_per_image"]) == ("", "")


def test_an_identical_picture_says_so(tmp_path):
    quality = {"pairs": 1, "identical": True, "psnr": None, "ssim": 1.0, "max_error": 0, "samples": []}
    job(tmp_path, "0", dump(quality=quality))
    (row,) = table(tmp_path)
    assert (row["psnr"], row["ssim"], row["max_error"]) == ("", "1.0", "0")
    assert "| identical | 1.000 |         0 |" in to_markdown(job_reader.read_jobs(tmp_path))


def test_the_interval_never_starts_below_zero_and_narrows_with_repeats():
    assert measure([1.0, 9.0]).low == 0
    widths = [measure([1.0, 2.0] * count).high for count in (2, 4, 5, 6, 7, 20)]
    assert widths == sorted(widths, reverse=True)


def test_only_settings_that_tell_jobs_apart_or_did_not_take_effect_have_a_column(tmp_path):
    job(tmp_path, "0", dump(), "parallel=single")
    two = {"requested": {**dump()["requested"], "parallel": {"num_gpus": 2, "tp_size": 2}},
           "effective": {**dump()["effective"], "parallel": {"tp": 2}}}  # fmt: skip
    job(tmp_path, "1", dump(**two), "parallel=tp2")
    rows = table(tmp_path)
    settings = [name for name in rows[0] if name.startswith(("requested.", "effective."))]
    assert settings == ["requested.attention", "effective.attention", "requested.parallel.num_gpus",
                        "effective.parallel.tp", "requested.parallel.tp_size"]  # fmt: skip
    assert [row["effective.parallel.tp"] for row in rows] == ["1", "2"]
    assert [row["requested.parallel.tp_size"] for row in rows] == ["", "2"]
    text = to_markdown(job_reader.read_jobs(tmp_path))
    assert "- In effect: attention auto → sdpa\n" in text
    assert text.count("auto → sdpa") == 1


def test_a_job_without_a_dump_is_a_row_with_its_reason(tmp_path):
    job(tmp_path, "0", dump(), "parallel=single")
    job(tmp_path, "1", None, "parallel=tp2", status="failed", error="2 ranks | not\nhere")
    job(tmp_path, "2", None, "parallel=sp2", files=["generated_image_0.png"])
    job(tmp_path, "10", None, "dry_run=true")
    (tmp_path / "3").mkdir()
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "job.json").write_text("{")
    (tmp_path / "notes").mkdir()
    rows = {row["job"]: row for row in table(tmp_path)}
    assert list(rows) == ["0", "1", "2", "3", "4", "10"]
    assert (rows["1"]["status"], rows["1"]["error"]) == ("failed", "2 ranks | not\nhere")
    assert (rows["2"]["status"], rows["2"]["error"]) == ("completed", "perf.json is missing")
    assert (rows["3"]["status"], rows["3"]["error"]) == ("unfinished", "job.json is missing")
    assert rows["4"]["error"].startswith("job.json cannot be read: ")
    assert (rows["10"]["status"], rows["10"]["error"]) == ("completed", "")
    lines = to_markdown(job_reader.read_jobs(tmp_path)).splitlines()
    assert "- 1: 2 ranks | not here" in lines
    assert "- 2: perf.json is missing" in lines
    assert [line for line in lines if line.startswith("|   1 |") and "failed" in line]


def test_a_job_that_did_not_complete_has_no_times_from_a_dump_that_an_earlier_job_left(tmp_path):
    for name, status in enumerate(("failed", "interrupted", "unfinished", "planned")):
        job(tmp_path, str(name), dump(), status=status, files=[])
    for row in table(tmp_path):
        told = {name: value for name, value in row.items() if value}
        assert set(told) <= {"job", "status", "seconds"}
    assert "\n0 of 4 jobs completed, 1 planned without running.\n" in to_markdown(job_reader.read_jobs(tmp_path))


def test_the_markdown_says_once_what_all_jobs_share(tmp_path):
    for name, layout in enumerate(["single", "tp2"]):
        job(tmp_path, str(name), dump(), "model.path=a|b", f"parallel={layout}")
    lines = to_markdown(job_reader.read_jobs(tmp_path), "Sweep x").splitlines()
    assert lines[:3] == ["# Sweep x", "", "2 of 2 jobs completed."]
    assert "- All jobs: `'model.path=a|b'`" in lines
    assert "- In effect: attention auto → sdpa" in lines
    header = [cell.strip() for cell in next(line for line in lines if line.startswith("| job")).split("|")[1:-1]]
    assert header == ["job", "parallel", "step (ms)", "speed-up", "total (s)", "memory (MiB)"]
    assert "generated_image" not in "\n".join(lines)


@pytest.mark.whole
def test_a_sweep_leaves_its_table_and_a_failed_cell_does_not_stop_it(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sd3"], *TINY, "--output-path", "sweep", TABLE,
                  "-m", "sampling.num_samples=1,2", "quant=none,nunchaku")  # fmt: skip
    assert done.code == 1, done.err
    assert [line for line in done.lines if "able of the sweep" in line] == [
        "INFO: Table of the sweep saved to: sweep/table.csv", "INFO: Table of the sweep saved to: sweep/table.md",
    ]  # fmt: skip
    rows = read(Path("sweep/table.csv"))
    assert [row["status"] for row in rows] == ["completed", "refused", "completed", "refused"]
    assert all("quant" in row["error"] for row in rows[1::2])
    assert rows[2]["pictures"] == "2/generated_image_0.png 2/generated_image_1.png"
    assert float(rows[0]["step_s"]) > 0
    assert (rows[0]["requested.backend"], rows[0]["effective.dtype"] != "auto") == ("auto", True)
    text = Path("sweep/table.md").read_text("utf-8")
    assert f"- 1, 3: {rows[1]['error'].partition(' ')[0]}" in text
    assert done.out == text  # no terminal here, so what is printed is as wide as the file


@pytest.mark.whole
def test_a_failed_job_has_nothing_of_the_job_that_had_its_folder_before(pipelines, sglang):
    words = ("--model-path", pipelines["sd3"], *TINY, "--output-path", "sweep", "-m")
    assert sglang("generate", *words, "sampling.num_samples=1,2").code == 0
    assert sglang("generate", *words, "sampling.num_samples=1,0").code == 1
    first, second = read(Path("sweep/table.csv"))
    assert (first["status"], first["pictures"], first["step_s"] > "0") == ("completed", "0/generated_image_0.png", True)
    assert second["error"] == "sampling.num_samples is 0; it must be at least 1"
    assert {name for name, value in second.items() if value} == {"job", "overrides", "status", "error", "seconds"}


@pytest.mark.whole
def test_a_dry_run_in_a_sweep_is_planned(sglang):
    done = sglang("generate", "--prompt", "a", "--output-path", "sweep", "-m", "dry_run=true", "sampling.seed=1,2")
    assert done.code == 0, done.err
    assert [row["status"] for row in read(Path("sweep/table.csv"))] == ["planned", "planned"]
    assert "# Sweep" not in done.out  # what the dry runs print is not followed by a table without numbers


@pytest.mark.whole
def test_a_table_that_cannot_be_written_is_one_line_and_changes_no_exit_code(pipelines, sglang):
    (Path("sweep") / "table.csv").mkdir(parents=True)
    done = sglang("generate", "--model-path", pipelines["sd3"], *TINY, "--output-path", "sweep", TABLE, "-m")
    assert done.code == 0, done.err
    (line,) = [line for line in done.lines if "able of the sweep" in line]
    assert line.startswith("ERROR: The table of the sweep could not be written: sweep/table.csv cannot be written: ")


@pytest.mark.whole
def test_a_shipped_sweep_runs_and_a_refused_cell_is_a_row_with_its_reason(pipelines, sglang):
    done = sglang("generate", "--config-dir", SWEEPS, "--config-name", "parallelism", "--output-path", "sweep", TABLE,
                  "--model-path", pipelines["sd3"], *TINY[4:], "parallel=single",
                  "sampling.num_samples=1,0")  # fmt: skip
    assert done.code == 0, done.err
    rows = read(Path("sweep/table.csv"))
    assert [row["status"] for row in rows] == ["completed", "refused"]
    assert all(row["overrides"].startswith("parallel=single ") for row in rows)
    assert rows[1]["error"] == "sampling.num_samples is 0; it must be at least 1"


def shipped() -> dict[str, Choices]:
    found = {path.stem: Choices(config_dir=str(SWEEPS), config_name=path.stem) for path in SWEEPS.glob("*.yaml")}
    assert set(found) == set(CELLS)
    return found


@pytest.mark.whole
def test_every_shipped_sweep_names_options_that_exist_and_fixes_prompt_and_seed():
    for name, choices in shipped().items():
        assert multirun.is_multirun(choices, requested=False)
        run = compose.compose(choices).run
        assert (run.model.preset, run.model.path, run.sampling.seed) == ("landscape", None, 42)
        assert run.sampling.prompt
        assert run.compile.warmup
        params = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text("utf-8"))["hydra"]["sweeper"]["params"]
        values = {key: str(words).split(",") for key, words in params.items()}
        assert math.prod(map(len, values.values())) == CELLS[name]
        for key, words in values.items():
            folder = env.conf_dir() / key
            assert not folder.is_dir() or all((folder / f"{word}.yaml").exists() for word in words), (name, key)


@pytest.mark.slow
def test_every_cell_of_every_shipped_sweep_composes():
    for name, choices in shipped().items():
        jobs = multirun.prepare(choices).run(lambda job: compose.compose(job.choices).run, seed=1, finish=lambda: None)
        runs = [job.result for job in jobs]
        assert len(runs) == CELLS[name]
        assert len({repr(run) for run in runs}) == len(runs), f"{name} has two equal cells"


def test_a_folder_that_cannot_be_read_is_not_a_sweep_without_jobs(tmp_path, monkeypatch):
    for name in ("0", "other"):
        (tmp_path / name).mkdir()
    known, closed = os.stat, [tmp_path / "0"]

    def refused(path: object, *_: object, **__: object) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def stat(path: object, **options: object) -> object:
        return refused(path) if Path(str(path)).parent in closed else known(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    (row,) = job_reader.read_jobs(tmp_path)
    assert (row.status, row.error) == ("unfinished", "job.json cannot be read: Permission denied")
    closed.append(tmp_path / "other")
    with pytest.raises(UserError, match=r"other/job.json cannot be read: Permission denied"):
        job_reader.read_jobs(tmp_path)
    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(UserError, match=f"^{tmp_path} cannot be read: Permission denied"):
        job_reader.read_jobs(tmp_path)
