"""Trackers: what a run tells a CSV file, alone and at the same time as another, and Weights & Biases offline."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sglang_gen import log
from sglang_gen.config.schema import Run, Tracker
from sglang_gen.errors import RunError
from sglang_gen.outputs import tracking

REPORT = {
    "schema_version": 1,
    "timestamp": "2026-01-02T03:04:05.678+00:00",
    "request_id": "abc",
    "commit_hash": None,
    "tag": "night",
    "total_duration_ms": 1000.0,
    "steps": [{"name": "load", "duration_ms": 500.0}, {"name": "denoising", "duration_ms": 800.0}],
    "denoise_steps_ms": [{"step": step, "duration_ms": 200.0 + step, "batch": 0} for step in range(4)],
    "memory_checkpoints": {"denoising": {"peak_allocated_mb": None, "peak_host_anon_mb": 321.5}},
    "meta": {"prompt": 'a "lake", and\r\na tree', "model": "tiny"},
    "samples": [{"index": 0, "prompt": "a lake", "seed": 7, "file": "generated_image_0.png"}],
    "images_per_second": 1.0,
    "energy_j": {"total": 60.5, "per_image": 60.5, "sources": {"cpu": 60.5}},
    "requested": {"attention": "auto", "parallel": {"num_gpus": 1}},
    "effective": {"attention": "sdpa", "parallel": {"tp": 1}, "height": 32, "width": 64, "compile": False},
    "fingerprint": {"hash": "f00", "fields": {}},
    "work": {"denoising": {"flops": 10**9, "mfu": 0.25, "bound": "compute"}},
    "quality": None,
}
APPEND = """
import sys
from pathlib import Path
from sglang_gen.outputs.tracking import append_row
for row in range(25):
    append_row(Path("runs.csv"), {"who": sys.argv[1], "row": row, f"only_{sys.argv[1]}": row})
assert not {"torch", "hydra", "wandb"} & set(sys.modules)
"""


def run_with(tracker: Tracker, folder: Path) -> Run:
    run = Run()
    run.tracking.name = tracker
    run.tracking.project = "landscapes"
    run.output.path = str(folder)
    run.perf.tag = "night"
    run.sampling.prompt, run.sampling.seed = 'a "lake"', 7
    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_every_run_adds_one_row_to_the_csv_file(tmp_path):
    run = run_with(Tracker.csv, tmp_path)
    for _ in range(2):
        tracking.track(run, REPORT, [tmp_path / "generated_image_0.png"])
    first, second = rows(tmp_path / "runs.csv")
    assert first == second
    expected = {
        "request_id": "abc", "tag": "night", "commit_hash": "", "prompt": 'a "lake", and\r\na tree', "seed": "7",
        "files": "generated_image_0.png", "num_inference_steps": "50", "height": "32", "width": "64", "load_s": "0.5",
        "denoising_s": "0.8", "decoding_s": "", "step_s": "0.2015", "total_s": "1.0", "peak_host_mb": "321.5",
        "joules_per_image": "60.5", "peak_device_mb": "", "requested.attention": "auto", "effective.attention": "sdpa",
        "effective.parallel": '{"tp": 1}', "fingerprint": "f00",
    }  # fmt: skip
    assert {name: first[name] for name in expected} == expected


def test_the_columns_are_the_same_for_a_run_that_measured_less(tmp_path):
    less = {**REPORT, "steps": [], "denoise_steps_ms": [], "memory_checkpoints": {}, "work": None, "energy_j": None}
    run = run_with(Tracker.csv, tmp_path)
    assert list(tracking.row(run, less, [])) == list(tracking.row(run, REPORT, []))


def test_new_columns_leave_older_rows_as_they_are(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes('\ufeffa,b\r\n1,"x, ""y""\nz"\r\n2\r\n'.encode())  # by a spreadsheet; the last row is short
    tracking.append_row(path, {"c": 3, "a": 4})
    assert path.read_text("utf-8").splitlines()[0] == "a,b,c"
    assert rows(path) == [
        {"a": "1", "b": 'x, "y"\nz', "c": ""}, {"a": "2", "b": "", "c": ""}, {"a": "4", "b": "", "c": "3"},
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"a,b\n1,2,3\n", b'a\n"x', b"\xff\xfe\n"])
def test_a_file_that_is_no_table_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(RunError, match="move it away"):
        tracking.append_row(path, {"a": 1})
    assert path.read_bytes() == content


@pytest.mark.whole
def test_two_processes_that_append_at_once_lose_no_row(tmp_path):
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", APPEND, name], cwd=tmp_path) for name in ("one", "two")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    found = rows(tmp_path / "runs.csv")
    for name in ("one", "two"):
        own = [row for row in found if row["who"] == name]
        assert [row["row"] for row in own] == [row[f"only_{name}"] for row in own] == [str(row) for row in range(25)]
    assert len(found) == 50
    assert {path.name for path in tmp_path.iterdir()} == {"runs.csv", ".runs.csv.lock"}


def test_a_file_that_another_run_keeps_locked_is_an_error_in_one_sentence(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(tracking, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".runs.csv.lock"), pytest.raises(RunError, match="locked by another run"):
        tracking.append_row(tmp_path / "runs.csv", {"a": 1})


def test_no_tracker_writes_nothing(tmp_path):
    tracking.track(run_with(Tracker.none, tmp_path), REPORT, [])
    assert list(tmp_path.iterdir()) == []


def records(path: Path) -> list:
    """Protobuf records of a .wandb file: a LevelDB log in blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, found = path.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a record's header does not cross blocks
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def items(updates: object) -> dict[str, object]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


@pytest.mark.whole
def test_wandb_keeps_config_numbers_and_pictures_offline_and_says_nothing(tmp_path, capfd, monkeypatch):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "generated_image_0.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    run = run_with(Tracker.wandb, tmp_path)
    run.sampling.prompts = [{"prompt": "long " * 10_000}]  # longer than a block of the file
    log.setup("warning")
    tracking.track(run, REPORT, [path], "offline")
    assert capfd.readouterr() == ("", "")

    wandb.teardown()  # waits for W&B's own process, as the end of a program does
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    kept = records(file)
    (start,) = [record.run for record in kept if record.WhichOneof("record_type") == "run"]
    config = items(start.config.update)
    assert (start.project, list(start.tags), start.job_type) == ("landscapes", ["night"], "generate")
    assert config["sampling"]["prompts"] == run.sampling.prompts
    assert config["tracking"] == {"name": "wandb", "project": "landscapes"}
    assert config["effective"]["attention"] == "sdpa"

    history = [items(record.history.item) for record in kept if record.WhichOneof("record_type") == "history"]
    assert [line["denoise_step_ms"] for line in history[:-1]] == [200.0, 201.0, 202.0, 203.0]
    numbers = {name: value for name, value in history[-1].items() if not name.startswith(("_", "pictures"))}
    assert numbers == {
        "total_duration_ms": 1000.0, "steps/load/duration_ms": 500.0, "steps/denoising/duration_ms": 800.0,
        "memory_checkpoints/denoising/peak_host_anon_mb": 321.5, "images_per_second": 1.0,
        "work/denoising/flops": 10**9, "work/denoising/mfu": 0.25,
        "energy_j/total": 60.5, "energy_j/per_image": 60.5, "energy_j/sources/cpu": 60.5,
    }  # fmt: skip
    (picture,) = file.parent.glob("files/media/images/*.png")
    assert np.array_equal(np.asarray(Image.open(picture)), pixels)
    pictures = {name: value for name, value in history[-1].items() if name.startswith("pictures")}
    assert "a lake" in json.dumps(pictures)


def test_a_mode_that_wandb_does_not_know_is_an_error_in_one_sentence(tmp_path):
    with pytest.raises(RunError, match=r"W&B did not accept the run: --log-level debug"):
        tracking.track(run_with(Tracker.wandb, tmp_path), REPORT, [], "offlien")


@pytest.mark.whole
def test_a_disabled_wandb_is_a_warning_and_writes_nothing(tmp_path, capsys):
    log.setup("info")
    tracking.track(run_with(Tracker.wandb, tmp_path), REPORT, [], "disabled")
    assert capsys.readouterr().err.startswith("WARNING: tracking=wandb has no effect")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_the_lock_empties_no_file(tmp_path):
    (tmp_path / "kept").write_text("mine")
    (tmp_path / ".runs.csv.lock").symlink_to("kept")
    with pytest.raises(RunError, match=r"runs\.csv cannot be written: \.runs\.csv\.lock is a symbolic link"):
        tracking.append_row(tmp_path / "runs.csv", {"a": 1})
    assert (tmp_path / "kept").read_text() == "mine"
    assert not (tmp_path / "runs.csv").exists()
