"""perf.interleave: the repeats of all jobs of a sweep in turn."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_gen.errors import RunError


@pytest.fixture
def sweep(sglang, monkeypatch):
    """A sweep over seeds whose runs end at once; the seeds in the order in which they ran, and what a run does last."""
    ran = SimpleNamespace(seeds=[], then=lambda seed, times: None, pixels=lambda seed, times: seed)

    def execute(composed, session):
        run = composed.run
        seed = run.sampling.seed
        ran.seeds.append(seed)
        assert run.perf.repeat == 1
        ran.then(seed, ran.seeds.count(seed))
        Path(run.output.path, "generated_image_0.png").write_bytes(b"")
        report = {"repeats": [{"denoise_steps_ms": [{"duration_ms": 10.0 * len(ran.seeds)}]}],
                  "load": {"imports_ms": 0, "reused": False}}  # fmt: skip
        report |= report["repeats"][0]
        Path(run.output.perf_dump_path).write_text(json.dumps(report))
        frames = (np.full((1, 1, 3), ran.pixels(seed, ran.seeds.count(seed))),)
        return SimpleNamespace(report=report, frames=frames)

    monkeypatch.setattr(importlib.import_module("sglang_gen.generate"), "execute", execute)

    def run(*words):
        words = words or ("perf.repeat=3",)
        return sglang("generate", "--prompt", "x", "--output-path", "sweep", "-m", "perf.interleave=true",
                      "sampling.seed=1,2", *words)  # fmt: skip

    ran.run = run
    return ran


def read(number: int, name: str) -> dict:
    return json.loads(Path("sweep", str(number), name).read_text())


def test_all_jobs_run_before_one_repeats(sweep):
    done = sweep.run()
    assert (done.code, sweep.seeds) == (0, [1, 2, 1, 2, 1, 2])
    steps = [
        [each["denoise_steps_ms"][0]["duration_ms"] for each in read(job, "perf.json")["repeats"]] for job in (0, 1)
    ]
    assert steps == [[10, 30, 50], [20, 40, 60]]
    assert [read(job, "job.json")["status"] for job in (0, 1)] == ["completed"] * 2
    turns = [line for line in done.lines if "repeat 2 of 3" in line or "repeat 3 of 3" in line]
    assert turns == [f"INFO: Job {job} of 2, repeat {number} of 3" for number in (2, 3) for job in (1, 2)]
    assert sum(re.search(r"completed in .* a step \(", line) is not None for line in done.lines) == 2
    assert [path.name for path in Path("sweep/0").iterdir() if path.suffix == ".png"] == ["generated_image_0.png"]


def test_jobs_with_fewer_repeats_end_earlier(sweep):
    assert sweep.run("perf.repeat=2,3").code == 0
    assert sweep.seeds == [1, 1, 2, 2, 1, 1, 2, 2, 1, 2]


def test_a_job_that_fails_in_a_later_round_is_failed_and_the_others_go_on(sweep):
    def then(seed, times):
        if (seed, times) == (1, 2):
            raise RunError("It broke")

    sweep.then = then
    done = sweep.run()
    assert (done.code, sweep.seeds) == (1, [1, 2, 1, 2, 2])
    assert "ERROR: Job 1 of 2 failed: It broke" in done.lines
    assert "INFO: Multirun: 1 of 2 jobs succeeded, 1 failed" in done.lines
    assert [read(job, "job.json")["status"] for job in (0, 1)] == ["failed", "completed"]


def test_a_sweep_that_is_interrupted_between_repeats_completes_no_job(sweep):
    def then(seed, times):
        if (seed, times) == (2, 2):
            raise KeyboardInterrupt

    sweep.then = then
    assert sweep.run().code == 130
    assert [read(job, "job.json")["status"] for job in (0, 1)] == ["interrupted"] * 2
    assert Path("sweep/table.md").exists()
    sweep.then = lambda seed, times: None
    sweep.seeds.clear()
    assert sweep.run().code == 0
    assert sweep.seeds == [1, 2, 1, 2, 1, 2]


def test_a_sample_that_differs_between_rounds_is_a_warning(sweep):
    sweep.pixels = lambda seed, times: times if seed == 2 else 0
    lines = sweep.run("perf.repeat=2").lines
    assert [line for line in lines if line.startswith("WARNING")] == [
        "WARNING: Job 2 of 2: sample 0 differs when it is generated again"
    ]


def test_what_cannot_take_turns_is_refused(sweep):
    for words, sentence in (
        (("perf.repeat=1",), "set perf.repeat to 2 or more"),
        (("perf.repeat=2", "perf.objective=step_ms"), "perf.interleave and perf.objective exclude each other"),
    ):
        done = sweep.run(*words)
        assert (done.code, sweep.seeds) == (1, [])
        assert sentence in done.err


def test_one_run_has_no_turns_to_take(sglang):
    done = sglang("generate", "--prompt", "x", "perf.interleave=true", "dry_run=true")
    assert (
        "WARNING: perf.interleave has no effect outside a multirun: it is the order of the repeats of several jobs"
        in done.err
    )


@pytest.mark.slow
def test_real_jobs_in_turn_have_the_intervals_and_images_of_all_rounds(sglang, pipelines):
    words = ("--model-path", pipelines["sd15"], "--prompt", "a", "--seed", 1, "--height", 32, "--width", 32)
    done = sglang("generate", *words, "--num-inference-steps", 2, "--output-path", "sweep", "-m", "perf.repeat=2",
                  "perf.interleave=true", "attention=sdpa,math", "perf.machine_rates=false")  # fmt: skip
    assert done.code == 0, done.err
    assert "differs" not in done.err
    for job in (0, 1):
        dump = read(job, "perf.json")
        assert [len(each["denoise_steps_ms"]) for each in dump["repeats"]] == [2, 2]
        assert read(job, "job.json")["files"] == ["generated_image_0.png"]
    assert read(1, "job.json")["reused"]
