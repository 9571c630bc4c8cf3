"""The plugins of Hydra that run the jobs of a sweep elsewhere, or choose them: joblib, submitit and Optuna."""

import csv
import json
import os
from pathlib import Path

import pytest

from sglang_gen.config import hydra_loader

SWEEPS = Path(__file__).parent.parent / "sweeps"
SHORT = ("--config-dir", SWEEPS, "--config-name", "attention", "--output-path", "sweep", "perf=light",
         "sampling.num_inference_steps=2", "perf.repeat=2", "compile.warmup=false")  # fmt: skip


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Workers import the package from this checkout, and look for plugins afresh."""
    monkeypatch.setenv("PYTHONPATH", str(SWEEPS.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hydra_loader.instantiable.cache_clear()


def rows() -> list[dict[str, str]]:
    with Path("sweep/table.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def notes() -> list[dict]:
    paths = sorted(Path("sweep").glob("*/job.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), ("hydra/launcher=submitit_local",)]
)
def test_a_launcher_runs_a_shipped_sweep_and_resumes_it(sglang, launcher):
    words = ("generate", *SHORT, *launcher)
    done = sglang(*words, "attention=sdpa,math,cudnn")
    assert done.code == 0, done.err
    assert done.lines[-1] == "INFO: Multirun: 2 of 3 jobs succeeded, 1 refused"
    assert [row["status"] for row in rows()] == ["completed", "completed", "refused"]
    assert [(note["status"], note["kept"]) for note in notes()] == [
        ("completed", False), ("completed", False), ("refused", False),
    ]  # fmt: skip
    assert all(float(row["step_s"]) > 0 for row in rows()[:2])
    done = sglang(*words, "attention=sdpa,math,cudnn", "sweep.skip_refused=false")
    assert (done.code, done.lines[-1]) == (1, "INFO: Multirun: 2 of 3 jobs succeeded (2 kept), 1 refused"), done.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of optuna 2 about its own and about numpy
def test_optuna_searches_a_shipped_sweep_and_finds_its_jobs_again(sglang):
    words = ("generate", *SHORT, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=minimize",
             "hydra.sweeper.sampler.seed=1", "~hydra.sweeper.params.attention", "attention=choice(sdpa,math)",
             "perf.objective=step_ms")  # fmt: skip
    done = sglang(*words)
    assert done.code == 0, done.err
    assert any(line.startswith("INFO: Job 3 of 3 completed in ") for line in done.lines)
    again = sglang(*words)
    assert (again.code, again.lines[-1]) == (0, "INFO: Multirun: 3 of 3 jobs succeeded (3 kept)"), again.err
    told = [[line for line in each.lines if line.startswith("INFO: Objective step_ms: ")] for each in (done, again)]
    assert len(told[0]) == 3
    assert told[0] == told[1]
    assert "trial" not in again.err.lower()
    assert os.path.exists("sweep/optimization_results.yaml")
