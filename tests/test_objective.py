"""perf.objective: the number of a job's perf dump that a sweeper optimises."""

import csv
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

import sglang_gen
from sglang_gen.config import hydra_loader
from sglang_gen.errors import RunError, UserError
from sglang_gen.perf import objective
from sglang_gen.perf.memory import Checkpoint

SMALL = ("--height", "32", "--width", "32", "perf=light", "--seed", "1", "--prompt", "x")


class Minimiser(Sweeper):
    """Tries the values of one key, one batch each, and keeps the least objective; it returns nothing."""

    def __init__(self, values: str = "3,1,2", forgiving: bool = False) -> None:
        self.values, self.forgiving = values.split(","), forgiving
        self.seen: list = []

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        for number, value in enumerate(self.values):
            (job,) = self.launcher.launch([[f"sampling.num_inference_steps={value}", *arguments]], number)
            try:
                self.seen.append((float(job.return_value), value))
            except RunError:
                if not self.forgiving:
                    raise
        Path("best.json").write_text(json.dumps(min(self.seen)))


class Idle(Minimiser):
    """Looks at no result."""

    def sweep(self, arguments: list[str]) -> None:
        self.launcher.launch([[f"sampling.num_inference_steps={value}", *arguments] for value in self.values], 0)


class OptunaSweeper(Minimiser):
    """Has the name and the module of Hydra's plugin, and takes its settings."""

    def __init__(self, direction: str = "", n_trials: int = 0, params: object = None, **others: object) -> None:
        super().__init__(**others)


SWEEPERS = {
    "hydra_plugins.minimiser": Minimiser,
    "hydra_plugins.idle": Idle,
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper": OptunaSweeper,
}


@pytest.fixture(autouse=True)
def _plugins(monkeypatch) -> Iterator[None]:
    hydra_loader.instantiable.cache_clear()  # what Hydra may instantiate is looked at once a process
    for name, kind in SWEEPERS.items():
        packages = name.split(".")
        for depth in range(1, len(packages) + 1):
            module = ModuleType(".".join(packages[:depth]))
            module.__path__ = []
            if depth == 1:
                module = sys.modules.get(module.__name__, module)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, kind.__name__, kind)
        kind.__module__ = name
        Plugins.instance().register(kind)
        node = {"_target_": f"{name}.{kind.__name__}", "values": "3,1,2", "forgiving": False}
        ConfigStore.instance().store(group="hydra/sweeper", name=kind.__name__.lower(), node=node)
    yield
    hydra_loader.instantiable.cache_clear()


@pytest.fixture
def run(pipelines, sglang):
    def sweep(*words: object):
        return sglang("generate", "-m", "--model-path", pipelines["sd15"], *SMALL, "--output-path", "sweep", *words)

    return sweep


@pytest.fixture
def dumps(monkeypatch):
    """Runs end at once, with a perf dump whose step takes 10 ms for each of the run's steps."""

    def execute(composed, session):
        steps = composed.run.sampling.num_inference_steps
        if steps == 1 and composed.run.sampling.num_samples == 2:
            raise RunError("It broke")
        if composed.run.dry_run:
            return None
        each = {"total_duration_ms": 20.0 * steps, "denoise_steps_ms": [{"duration_ms": 10.0 * steps}], "tag": "a",
                "images_per_second": 1 / steps, "load": {"imports_ms": 0, "reused": False}}  # fmt: skip
        return SimpleNamespace(report={**each, "steps": [{"name": "denoising", "duration_ms": 5}], "quality": None})

    monkeypatch.setattr(importlib.import_module("sglang_gen.generate"), "execute", execute)


@pytest.fixture
def optuna() -> None:
    """The option hydra/sweeper=optuna of the plugin."""
    target = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    node = {"_target_": target, "direction": "minimize", "n_trials": 20, "params": {}}
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=node)


def best() -> list:
    return json.loads(Path("best.json").read_text())


def statuses() -> list[str]:
    return [json.loads(path.read_text())["status"] for path in sorted(Path("sweep").glob("*/job.json"))]


@pytest.mark.whole
def test_a_sweeper_optimises_a_number_of_each_jobs_perf_dump(run):
    done = run("hydra/sweeper=minimiser", "perf.objective=steps.denoising.duration_ms")
    assert done.code == 0, done.err
    assert done.lines[-1] == "INFO: Multirun: 3 of 3 jobs succeeded"
    measured = {}
    for number, value in enumerate(("3", "1", "2")):
        stages = json.loads(Path(f"sweep/{number}/perf.json").read_text())["steps"]
        measured[value] = next(stage["duration_ms"] for stage in stages if stage["name"] == "denoising")
        assert f"INFO: Objective steps.denoising.duration_ms: {measured[value]}" in done.lines
    value, argument = best()
    assert measured[argument] == value == min(measured.values())


@pytest.mark.whole
def test_the_objective_may_stand_in_a_sweep_file(dumps, sglang):
    Path("sweeps").mkdir()
    Path("sweeps/best.yaml").write_text(
        "defaults: [config, {override /hydra/sweeper: minimiser}, _self_]\nhydra: {mode: MULTIRUN}\n"
        "perf: {objective: step_ms}\n"
    )
    done = sglang("generate", "--config-dir", "sweeps", "--config-name", "best", *SMALL, "--output-path", "sweep")
    assert done.code == 0, done.err
    assert best() == [10.0, "1"]


@pytest.mark.whole
def test_the_file_that_the_page_shows_is_such_a_sweep(dumps, optuna, sglang):
    page = Path(sglang_gen.__file__).parents[1] / "docs" / "sweeps.md"
    Path("sweeps").mkdir()
    (shown,) = re.findall(r"```yaml\n(# sweeps/fastest.yaml\n.*?)```", page.read_text(), re.DOTALL)
    Path("sweeps/fastest.yaml").write_text(shown)
    done = sglang("generate", "--config-dir", "sweeps", "--config-name", "fastest", "--output-path", "sweep")
    assert done.code == 0, done.err
    assert best() == [1 / 3, "3"]


@pytest.mark.whole
@pytest.mark.parametrize("sweeper", ["idle", "basic"])
def test_jobs_whose_results_nobody_wants_need_no_objective(dumps, run, sweeper):
    done = run(f"hydra/sweeper={sweeper}", "--num-samples", "2", *(() if sweeper == "idle" else
               ("sampling.num_inference_steps=3,1,2",)))  # fmt: skip
    assert (done.code, done.lines[-1]) == (1, "INFO: Multirun: 2 of 3 jobs succeeded, 1 failed"), done.err
    assert statuses() == ["completed", "failed", "completed"]


@pytest.mark.whole
def test_a_grid_with_an_objective_goes_on_after_a_failed_job(dumps, run):
    done = run("--num-samples", "2", "sampling.num_inference_steps=3,1,2", "perf.objective=step_ms")
    assert (done.code, done.lines[-1]) == (1, "INFO: Multirun: 2 of 3 jobs succeeded, 1 failed"), done.err
    assert statuses() == ["completed", "failed", "completed"]


@pytest.mark.whole
def test_an_optimiser_without_an_objective_is_one_sentence_before_any_job(dumps, run):
    done = run("hydra/sweeper=optunasweeper")
    assert done.code == 2
    sentence = (
        "OptunaSweeper optimizes a number that each job returns, and these jobs return none (perf.objective is not set)"
    )
    assert sentence in done.lines[-1]
    assert not Path("sweep").exists()
    assert run("hydra/sweeper=optunasweeper", "perf.objective=step_ms").code == 0
    assert best() == [10.0, "1"]


@pytest.mark.parametrize("words", [(), ("perf.objective=step_ms", "dry_run=true")])
def test_a_sweeper_that_finds_no_number_is_one_sentence(dumps, run, words):
    done = run("hydra/sweeper=minimiser", *words)
    assert done.code == 2
    assert (
        "Minimiser optimizes a number that each job returns, and these jobs return none: name a number of the perf dump"
        in done.lines[-1]
    )
    assert "Traceback" not in done.err
    assert Path("sweep/table.csv").exists()


@pytest.mark.whole
def test_a_failed_job_is_a_failed_trial(dumps, run):
    words = ("hydra/sweeper=minimiser", "--num-samples", "2", "perf.objective=step_ms")
    done = run(*words)
    assert (done.code, done.lines[-1]) == (1, "ERROR: Job 2 failed: It broke")
    assert statuses() == ["completed", "failed"]
    assert [row["status"] for row in csv.DictReader(Path("sweep/table.csv").read_text().splitlines())] == [
        "completed",
        "failed",
    ]
    done = run(*words, "hydra.sweeper.forgiving=true")
    assert (done.code, done.lines[-1]) == (1, "INFO: Multirun: 2 of 3 jobs succeeded, 1 failed")
    assert best() == [20.0, "2"]
    assert "Traceback" not in done.err
    assert "Error executing job" not in done.err


def test_a_key_that_a_finished_dump_lacks_fails_the_job(dumps, run):
    done = run("perf.objective=machine.rates.matmul")
    assert done.code == 1
    assert (
        "Job 1 of 1 failed: perf.objective: the perf dump of this run has no number 'machine.rates.matmul'" in done.err
    )


@pytest.mark.parametrize(
    ("key", "words", "sentence"),
    [
        ("step_mss", (), "'step_mss' is not a number of the perf dump; did you mean 'step_ms'"),
        ("denoising", (), "did you mean 'steps.denoising.duration_ms'"),
        ("tag", (), "'tag' is not a number of the perf dump"),
        ("steps.denoise.duration_ms", (), "did you mean 'steps.denoising.duration_ms'"),
        ("quality.psnr", (), "'quality.psnr' needs quality.reference"),
        ("quality.summary.psnr.worst.value", (), "'quality.summary.psnr.worst.value' needs quality.reference"),
        ("warmup.duration_ms", (), "'warmup.duration_ms' needs --warmup"),
        ("work.denoising.mfu", ("perf.work=false",), "'work.denoising.mfu' needs perf.work=true"),
        ("' '", (), "perf.objective is blank"),
    ],
)
def test_a_key_that_no_dump_has_is_refused_before_the_run(pipelines, sglang, key, words, sentence):
    done = sglang("generate", "--model-path", pipelines["sd15"], *SMALL, f"perf.objective={key}", *words)
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err
    assert not Path("outputs").exists()


def test_outside_a_multirun_an_objective_has_no_effect(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sd15"], *SMALL, "perf.objective=step_ms", "dry_run=true")
    assert done.code == 0, done.err
    assert [line for line in done.lines if "objective" in line] == [
        "WARNING: perf.objective has no effect outside a multirun: it is what a job returns to the sweeper"
    ]


@pytest.mark.whole
def test_every_number_of_a_dump_has_a_key(pipelines, sglang):
    words = ("--num-inference-steps", "2", "--perf-dump-path", "perf.json", "perf.repeat=2", "--warmup", "perf=default")
    done = sglang("generate", "--model-path", pipelines["sd15"], *SMALL[:4], "--prompt", "x", *words)
    assert done.code == 0, done.err
    dump = json.loads(Path("perf.json").read_text())
    found = objective.numbers(dump)
    assert found["work.denoising.flops"] == dump["work"]["denoising"]["flops"]
    assert found["repeats.1.total_duration_ms"] == dump["repeats"][1]["total_duration_ms"]
    assert found["load.imports_ms"] == dump["load"]["imports_ms"]
    steps = sorted(step["duration_ms"] for repeat in dump["repeats"] for step in repeat["denoise_steps_ms"])
    assert steps[0] <= found["step_ms"] <= steps[-1]
    legal = {*objective.KNOWN, "schema_version"}
    assert [key for key in found if key not in legal and not key.startswith(objective.OPEN)] == []
    assert set(Checkpoint.__dataclass_fields__) == set(objective.OBJECTIVE_PEAKS)
    with pytest.raises(RunError, match=r"no number 'effective\.dtype'"):
        objective.value(dump, "effective.dtype")


def test_a_wrong_key_of_python_is_a_user_error():
    with pytest.raises(UserError, match=r"perf\.objective"):
        sglang_gen.generate("perf.objective=nothing", prompt="x")
