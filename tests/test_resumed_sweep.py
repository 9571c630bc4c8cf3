"""A sweep that is run again in its folder keeps the jobs that are complete and unchanged, and runs the others."""

import csv
import fcntl
import importlib
import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from started import generating

from sglang_gen import env
from sglang_gen.errors import RunError, UserError
from sglang_gen.sweep import identity, sweep_folder
from sglang_gen.sweep.pace import Pace

WORDS = ("--prompt", "x", "--output-path", "sweep", "-m")


def read(number: int, name: str = "job.json") -> dict:
    return json.loads(Path("sweep", str(number), name).read_text("utf-8"))


@pytest.fixture
def ran(sglang, monkeypatch):
    """Sweep with runs that end at once and leave an image, its record and a perf dump; the seeds that really ran."""
    seen: list = []

    def execute(composed, session):
        run = composed.run
        seen.append(run.sampling.seed)
        if run.sampling.num_inference_steps == 13:
            raise RunError("It broke")
        if run.sampling.num_inference_steps == 14:
            raise UserError("It cannot be done")
        folder = Path(run.output.path)
        taken = len(list(folder.glob("generated_image_*.png")))
        for suffix in ("png", "json"):
            (folder / f"generated_image_{taken}.{suffix}").write_text(f"{run.sampling.seed}")
        steps = [{"duration_ms": float(run.sampling.num_inference_steps)}]
        report = {"denoise_steps_ms": steps, "load": {"imports_ms": 0, "reused": False}}
        Path(run.output.perf_dump_path).write_text(json.dumps(report))
        return None if run.dry_run else SimpleNamespace(report=report)

    monkeypatch.setattr(importlib.import_module("sglang_gen.generate"), "execute", execute)

    def sweep(*words: object):
        seen.clear()
        done = sglang("generate", *WORDS, *words)
        return SimpleNamespace(code=done.code, lines=done.lines, err=done.err, seeds=list(seen))

    return sweep


@pytest.mark.whole
def test_the_same_command_keeps_what_is_complete_and_says_so(ran):
    assert ran("sampling.seed=1,2").seeds == [1, 2]
    first = read(0)
    done = ran("sampling.seed=1,2")
    assert (done.code, done.seeds) == (0, [])
    assert done.lines[-1] == "INFO: Multirun: 2 of 2 jobs succeeded (2 kept)"
    assert f"INFO: Job 2 of 2 kept: completed at {read(1)['ran_at']}" in done.lines
    again = read(0)
    assert (first["kept"], again["kept"]) == (False, True)
    assert {**again, "kept": False} == first


@pytest.mark.whole
def test_a_sweep_that_grows_runs_only_what_is_new(ran):
    ran("sampling.seed=1,2")
    assert ran("sampling.seed=1,2,3").seeds == [3]
    assert [read(number)["kept"] for number in range(3)] == [True, True, False]


@pytest.mark.whole
def test_a_changed_setting_runs_again_and_its_line_names_the_setting(ran):
    ran("sampling.seed=1,2")
    done = ran("sampling.seed=1,2", "--guidance-scale", "3")
    assert done.seeds == [1, 2]
    assert "INFO: Job 1 of 2 runs again: sampling.guidance_scale changed" in done.lines
    assert read(0)["files"] == ["generated_image_1.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("--log-level", "warning"), ("perf.objective=step_ms",), ("sweep.skip_refused=true",), ("hydra.job.name=x",)],
)
def test_a_setting_that_changes_no_result_runs_nothing_again(ran, words):
    ran("sampling.seed=1,2")
    assert ran("sampling.seed=1,2", *words).seeds == []


@pytest.mark.slow
def test_a_job_that_moves_to_another_folder_runs_again(ran):
    ran("sampling.seed=1,2")
    assert ran("sampling.seed=2,1").seeds == [2, 1]


@pytest.mark.slow
def test_changed_code_runs_again(ran, monkeypatch):
    ran("sampling.seed=1,2")
    monkeypatch.setattr(identity, "_package_digest", lambda: "other")
    done = ran("sampling.seed=1,2")
    assert done.seeds == [1, 2]
    assert "INFO: Job 1 of 2 runs again: the code of sglang-gen changed" in done.lines


@pytest.mark.slow
def test_another_version_of_a_library_runs_again(ran, monkeypatch):
    ran("sampling.seed=1,2")
    before = dict(env.versions())
    monkeypatch.setattr(env, "versions", lambda: {**before, "torch": "9"})
    done = ran("sampling.seed=1,2")
    assert done.seeds == [1, 2]
    assert "INFO: Job 1 of 2 runs again: versions.torch of the environment changed" in done.lines


@pytest.mark.slow
@pytest.mark.parametrize("key", ["sampling.prompts_file", "sampling.image_path", "lora.path", "quality.reference"])
def test_a_changed_input_file_runs_again(ran, key):
    place = Path("input")
    if key == "quality.reference":
        place = Path("input", "generated_image_0.png")
        place.parent.mkdir()
    place.write_text("a\n")
    words = ("sampling.seed=1", f"{key}=input")
    ran(*words)
    assert ran(*words).seeds == []
    place.write_text("b\n\n")
    done = ran(*words)
    assert done.seeds == [1]
    assert f"INFO: Job 1 of 1 runs again: the file or folder of {key} changed" in done.lines


@pytest.mark.slow
def test_a_model_folder_with_other_files_runs_again(ran):
    model = Path("model", "unet")
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    ran("sampling.seed=1", "--model-path", "model")
    assert ran("sampling.seed=1", "--model-path", "model").seeds == []
    (model / "config.json").write_text("{ }")
    assert ran("sampling.seed=1", "--model-path", "model").seeds == [1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generated_image_0.png", "generated_image_0.json", "perf.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_job_whose_files_are_gone_or_damaged_runs_again(ran, name, damage):
    ran("sampling.seed=1,2")
    path = Path("sweep", "1", name)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    done = ran("sampling.seed=1,2")
    assert done.seeds == [2]
    assert any(line.startswith(f"INFO: Job 2 of 2 runs again: {name} is ") for line in done.lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"status": "completed"}', '{"status": "completed", "identity": 3}']
)
def test_a_damaged_note_is_that_of_no_completed_job(ran, text):
    ran("sampling.seed=1,2")
    Path("sweep/0/job.json").write_text(text)
    assert ran("sampling.seed=1,2").seeds == [1]


@pytest.mark.slow
def test_failed_refused_and_unfinished_jobs_run_again(ran):
    ran("sampling.seed=1", "sampling.num_inference_steps=12,13,14,15")
    note = read(3)
    Path("sweep/3/job.json").write_text(json.dumps({**note, "status": "unfinished"}))
    done = ran("sampling.seed=1", "sampling.num_inference_steps=12,13,14,15")
    assert len(done.seeds) == 3
    assert read(0)["kept"]


@pytest.mark.slow
def test_resume_false_runs_all_jobs_again(ran):
    ran("sampling.seed=1,2")
    assert ran("sampling.seed=1,2", "sweep.resume=false").seeds == [1, 2]


@pytest.mark.whole
def test_a_drawn_seed_is_that_of_the_sweep_that_is_resumed(ran):
    (seed, same) = ran("sampling.guidance_scale=2,3").seeds
    assert seed == same == json.loads(Path("sweep/sweep.json").read_text())["seed"]
    assert ran("sampling.guidance_scale=2,3").seeds == []
    assert ran("sampling.guidance_scale=2,3,4").seeds == [seed]
    assert set(ran("sampling.guidance_scale=2,3", "sweep.resume=false").seeds) != {seed}


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "[]", '{"seed": -1}', '{"seed": "a"}'])
def test_a_damaged_seed_is_drawn_again(ran, text):
    Path("sweep").mkdir()
    Path("sweep/sweep.json").write_text(text)
    done = ran("sampling.guidance_scale=2")
    assert (done.code, json.loads(Path("sweep/sweep.json").read_text())["seed"]) == (0, done.seeds[0])


@pytest.mark.slow
def test_a_dry_run_keeps_a_completed_job_and_completes_none(ran):
    ran("sampling.seed=1")
    assert ran("sampling.seed=1", "dry_run=true").seeds == []
    assert read(0)["status"] == "completed"
    ran("sampling.seed=1,2", "dry_run=true")
    assert read(1)["status"] == "planned"
    assert ran("sampling.seed=1,2").seeds == [2]


@pytest.mark.slow
def test_a_kept_job_returns_its_objective_again(ran):
    ran("sampling.seed=1", "sampling.num_inference_steps=7")
    done = ran("sampling.seed=1", "sampling.num_inference_steps=7", "perf.objective=step_ms")
    assert done.seeds == []
    assert "INFO: Objective step_ms: 7.0" in done.lines


@pytest.mark.whole
def test_a_second_sweep_in_the_folder_is_refused_and_changes_nothing(ran):
    ran("sampling.seed=1,2")
    files = {path: path.read_bytes() for path in Path("sweep").rglob("*") if path.is_file()}
    descriptor = os.open("sweep/.sweep.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    files |= {Path("sweep/.sweep.lock"): b""}
    done = ran("sampling.seed=1,2,3")
    os.close(descriptor)
    assert (done.code, done.seeds) == (2, [])
    folder = Path("sweep")
    assert done.lines[-1].startswith(f"ERROR: Another sweep is running in {folder}: wait until it has ended, or give")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert ran("sampling.seed=1,2,3").seeds == [3]


@pytest.mark.whole
def test_an_interrupted_sweep_says_how_to_continue(sglang, monkeypatch):
    def execute(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("sglang_gen.generate"), "execute", execute)
    done = sglang("generate", "--prompt", "a b", "-m", "sampling.seed=1,2")
    assert done.code == 130
    found = re.search(
        r"Interrupted; continue with: (sglang generate --prompt 'a b' -m sampling.seed=1,2 (\S+))$", done.err
    )
    (folder,) = Path("outputs/multirun").iterdir()
    assert found[2] == f"hydra.sweep.dir={folder}"
    assert json.loads((folder / "sweep.json").read_text())["continue"] == found[1]


def test_the_command_that_continues_names_the_folder_once():
    folder = Path("out/a b")
    command = sweep_folder.command(("-m", "hydra.sweep.dir=out/${now:%Y}"), folder, named=False)
    assert command == "sglang generate -m 'hydra.sweep.dir=\"out/a b\"'"
    assert (
        sweep_folder.command(("-m", "--output-path", "x"), folder, named=True) == "sglang generate -m --output-path x"
    )
    assert sweep_folder.continuation(folder, "x" * 301) == "continue with the command in out/a b/sweep.json"


@pytest.mark.whole
def test_a_refused_job_is_told_from_a_failed_one(ran):
    done = ran("sampling.seed=1", "sampling.num_inference_steps=12,13,14")
    assert done.code == 1
    assert [read(number)["status"] for number in range(3)] == ["completed", "failed", "refused"]
    assert "ERROR: Job 3 of 3 refused: It cannot be done" in done.lines
    assert done.lines[-1] == "INFO: Multirun: 1 of 3 jobs succeeded, 1 refused, 1 failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "plain", "skipping"), [("12,14", 1, 0), ("12,13", 1, 1), ("14", 1, 1), ("12,13,14", 1, 1), ("12", 0, 0)]
)
def test_skip_refused_changes_the_exit_code_of_refusals_alone(ran, steps, plain, skipping):
    words = ("sampling.seed=1", f"sampling.num_inference_steps={steps}")
    assert ran(*words).code == plain
    done = ran(*words, "sweep.skip_refused=true")
    assert done.code == skipping
    assert not any("ERROR" in line and "refused" in line for line in done.lines)


@pytest.mark.whole
def test_each_job_says_its_step_time_and_the_time_left(ran, monkeypatch):
    monkeypatch.setattr("sglang_gen.sweep.note.Note.seconds", 12.34)
    done = ran("sampling.seed=1,2,3", "sampling.num_inference_steps=81")
    assert "INFO: Job 1 of 3: sampling.seed=1 sampling.num_inference_steps=81" in done.lines
    assert "INFO: Job 1 of 3 completed in 12.3 s: 81 ms a step; about 25 s left" in done.lines
    assert "INFO: Job 3 of 3 completed in 12.3 s: 81 ms a step" in done.lines


@pytest.mark.parametrize(
    ("seconds", "clause"),
    [([0.1], ""), ([30], "; about 60 s left"), ([100, 140], "; about 4 min left"), ([3000], "; about 1 h 40 min left")],
)
def test_the_time_left_is_that_of_the_mean_job(seconds, clause):
    pace = Pace()
    pace.seconds += seconds
    assert pace.left(0, 3) == clause
    assert pace.left(2, 3) == pace.left(0, None) == ""


@pytest.mark.slow
@pytest.mark.parametrize("key", ["resume", "skip_refused", "fresh"])
def test_a_setting_of_the_sweep_is_one_bool_for_all_jobs(ran, key):
    done = ran("sampling.seed=1,2", f"sweep.{key}=true,false")
    assert (done.code, done.lines[-1]) == (
        2, f"ERROR: sweep.{key} is a setting of the whole sweep and cannot be swept; give it one value",
    )  # fmt: skip
    done = ran("sampling.seed=1,2", f"sweep.{key}=maybe")
    assert (done.code, done.seeds) == (2, [])
    assert f"sweep.{key}" in done.lines[-1]


@pytest.mark.whole
def test_a_setting_of_a_sweep_is_warned_of_outside_one(sglang):
    done = sglang("generate", "--prompt", "x", "sweep.resume=false", "dry_run=true")
    assert "WARNING: sweep.resume has no effect outside a multirun: it is a setting of the sweep" in done.lines


MANY = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "perf=light", "sampling.num_samples=3")


@pytest.mark.slow
def test_a_sweep_that_is_killed_continues_with_the_job_in_which_it_was_killed(pipelines, sglang):
    words = ["--model-path", str(pipelines["sd15"]), "--prompt", "a", *MANY, "--output-path", "sweep", "-m",
             "sampling.guidance_scale=2,3,4"]  # fmt: skip
    process = generating(words)
    while (line := process.stderr.readline()) and "Job 2 of 3: " not in line:
        pass
    while (line := process.stderr.readline()) and "Generated image saved to: " not in line:
        pass
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert [read(number)["status"] for number in (0, 1)] == ["completed", "unfinished"]
    images = {path: path.read_bytes() for path in Path("sweep").glob("*/*.png")}
    seed = json.loads(Path("sweep/sweep.json").read_text())["seed"]
    done = sglang("generate", *words)
    assert done.code == 0, done.err
    assert done.lines[-1] == "INFO: Multirun: 3 of 3 jobs succeeded (1 kept)"
    assert [read(number)["kept"] for number in range(3)] == [True, False, False]
    assert all(path.read_bytes() == content for path, content in images.items())
    first = Path("sweep", "1", read(1)["files"][0])
    assert json.loads(first.with_suffix(".json").read_text())["sample"]["seed"] == seed
    assert len(read(1)["files"]) == 3
    assert Image.open(first).tobytes() == Image.open("sweep/1/generated_image_0.png").tobytes()
    with Path("sweep/table.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["completed"] * 3


@pytest.mark.slow
def test_a_thousand_dry_jobs_are_planned_within_a_minute(sglang):
    started = time.process_time()
    done = sglang(
        "generate", "--prompt", "x", "--output-path", "sweep", "-m", "dry_run=true", "sampling.seed=range(0,1000)"
    )
    seconds = time.process_time() - started
    print(f"1000 dry jobs took {seconds:.1f} s of processor time")
    assert (done.code, done.lines[-1]) == (0, "INFO: Multirun: 1000 of 1000 jobs succeeded")
    assert seconds < 60
