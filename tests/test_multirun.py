"""-m: every job in its own folder; one that fails does not stop the others, and the exit code tells."""

import csv
import errno
import importlib
import json
from pathlib import Path

import pytest

from sglang_gen.signals import Terminated

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "1")


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text("utf-8"))


@pytest.mark.whole
def test_each_job_leaves_picture_record_dump_and_note(pipelines, sglang):
    text = "a, b {c} ${oc.env:HOME}"
    done = sglang("generate", "-m", "--model-path", pipelines["sdxl"], "--prompt", text, *SMALL,
                  "sampling.guidance_scale=2,3", "--output-path", "swe ep,{1}")  # fmt: skip
    assert done.code == 0, done.err
    assert done.lines[-1] == "INFO: Multirun: 2 of 2 jobs succeeded"
    for number in (0, 1):
        folder = Path("swe ep,{1}", str(number))
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["generated_image_0.json", "generated_image_0.png", "job.json", "perf.json"]
        note = read(folder / "job.json")
        assert note["overrides"] == [f"sampling.guidance_scale={2 + number}"]
        assert (note["status"], note["error"], note["files"]) == ("completed", None, ["generated_image_0.png"])
        record = read(folder / "generated_image_0.json")
        assert record["sample"]["prompt"] == text
        assert record["run"]["sampling"]["guidance_scale"] == 2 + number
        assert read(folder / "perf.json")["meta"]["prompt"] == text
    seeds = {read(f"swe ep,{{1}}/{number}/generated_image_0.json")["sample"]["seed"] for number in (0, 1)}
    assert len(seeds) == 1
    assert f"INFO: Multirun: jobs without a seed use seed {seeds.pop()}" in done.lines


@pytest.mark.whole
def test_a_failing_job_does_not_stop_the_others_and_says_why(pipelines, sglang):
    done = sglang("generate", "-m", "--model-path", pipelines["sdxl"], "--prompt", "x", *SMALL,
                  "--output-path", "sweep", "sampling.guidance_scale=nan,2", "parallel.tp_size=1,8")  # fmt: skip
    assert done.code == 1
    assert done.lines[-1] == "INFO: Multirun: 1 of 4 jobs succeeded, 3 refused"
    assert "Traceback" not in done.err
    notes = [read(f"sweep/{number}/job.json") for number in range(4)]
    assert [note["status"] for note in notes] == ["refused", "refused", "completed", "refused"]
    assert "guidance_scale is nan; it must be a finite number" in notes[0]["error"]
    assert "parallel.tp_size is 8 and this network has layers of 4 heads" in notes[3]["error"]
    assert [path.parent.name for path in Path("sweep").glob("*/generated_image_0.png")] == ["2"]


@pytest.mark.slow
def test_a_sweep_over_models(pipelines, sglang):
    paths = f"{pipelines['sd15']},{pipelines['sdxl']},/nowhere"
    done = sglang("generate", "-m", f"model.path={paths}", "--prompt", "x", *SMALL, "--output-path", "sweep")
    assert done.code == 1
    assert "The model folder /nowhere does not exist" in read("sweep/2/job.json")["error"]
    assert [read(f"sweep/{number}/perf.json")["meta"]["model"] for number in (0, 1)] == [
        str(pipelines["sd15"]), str(pipelines["sdxl"]),
    ]  # fmt: skip


def test_a_plain_run_leaves_no_folder_or_log_of_hydra(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sdxl"], "--prompt", "x", *SMALL)
    assert done.code == 0, done.err
    assert sorted(path.name for path in Path().rglob("*")) == [
        "generated_image_0.json",
        "generated_image_0.png",
        "outputs",
    ]


@pytest.fixture
def sweep_file() -> tuple[str, ...]:
    Path("sweeps").mkdir()
    Path("sweeps/seeds.yaml").write_text(
        "defaults: [config, _self_]\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      sampling.seed: 1,2\n"
        "sampling:\n  num_samples: 3\n"
    )
    return "--config-dir", "sweeps", "--config-name", "seeds", "model=sdxl"


@pytest.mark.whole
def test_a_sweep_file_needs_no_m(composed, sglang, sweep_file, monkeypatch):
    seen: list = []
    monkeypatch.setattr("sglang_gen.sweep.jobs.run_job", lambda job, **_: seen.append(job) or 0)
    assert sglang("generate", *sweep_file, "--output-path", "sweep").code == 0
    assert [job.overrides for job in seen] == [("sampling.seed=1", "model=sdxl"), ("sampling.seed=2", "model=sdxl")]
    assert [job.folder for job in seen] == [Path("sweep/0").absolute(), Path("sweep/1").absolute()]


def test_a_sweep_file_can_be_run_once(composed, sweep_file):
    for word in ("--run", "hydra.mode=RUN"):
        assert composed(*sweep_file, word).run.sampling.num_samples == 3


@pytest.mark.whole
def test_jobs_compose_files_flags_and_sweep_choices(composed, sweep_file):
    Path("file.json").write_text('{"seed": 9, "height": 64, "width": 64, "output_path": "there"}')
    jobs = composed("-m", *sweep_file, "--config", "file.json", "--width", "128")
    assert [(job.run.sampling.seed, job.run.sampling.height, job.run.sampling.width) for job in jobs] == [
        (1, 64, 128), (2, 64, 128),
    ]  # fmt: skip
    assert [job.sources["sampling.seed"] for job in jobs] == ["override", "override"]
    assert [job.run.output.path for job in jobs] == [str(Path(f"there/{number}").absolute()) for number in (0, 1)]


@pytest.mark.whole
def test_an_unset_seed_is_one_seed_and_a_set_one_is_kept(composed):
    drawn = composed("-m", "model=sdxl", "sampling.height=64,128", "--output-path", "a")
    assert drawn[0].run.sampling.seed == drawn[1].run.sampling.seed is not None
    kept = composed("-m", "model=sdxl", "sampling.height=64,128", "--seed", "3", "--output-path", "b")
    assert [job.run.sampling.seed for job in kept] == [3, 3]


@pytest.mark.whole
def test_the_seed_of_a_sweep_is_told_where_a_job_uses_it(composed, sglang):
    told = [
        [any("jobs without a seed" in notice for notice in job.notices) for job in composed("-m", "model=sdxl", *words)]
        for words in (("sampling.seed=null,3", "--output-path", "a"), ("--seed", "3", "--output-path", "b"))
    ]
    assert told == [[True, False], [False]]
    assert "seed" not in sglang("generate", "-m", "model=sdxl", "output.path=a,b").err


@pytest.mark.whole
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_sweep_that_is_cut_short_has_a_table_of_what_is_there(sglang, monkeypatch, stop, code):
    def execute(composed, session):
        if composed.run.sampling.seed == 2:
            Path(composed.run.output.path, "generated_image_0.png").write_bytes(b"")
            raise stop

    monkeypatch.setattr(importlib.import_module("sglang_gen.generate"), "execute", execute)
    done = sglang("generate", "-m", "model=sdxl", "sampling.seed=1,2,3", "--output-path", "sweep")
    assert done.code == code
    rows = list(csv.DictReader(Path("sweep/table.csv").read_text().splitlines()))
    word = "interrupted" if stop is KeyboardInterrupt else "terminated"
    assert [row["status"] for row in rows] == ["planned", word]
    assert rows[1]["pictures"] == "1/generated_image_0.png"


@pytest.mark.slow
def test_globs_ranges_and_nothing_to_sweep(composed):
    jobs = composed("-m", "model=glob(sd3*)", "--prompt", "x", "--output-path", "a")
    assert [job.run.model.preset for job in jobs] == ["sd35_large", "sd35_medium", "sd3_medium"]
    jobs = composed(
        "-m", "model=sdxl", "sampling.seed=range(2)", "backend.diffusers_kwargs.eta=0.5", "--output-path", "b"
    )
    assert [(job.run.sampling.seed, job.run.backend.diffusers_kwargs) for job in jobs] == [
        (0, {"eta": 0.5}),
        (1, {"eta": 0.5}),
    ]
    assert len(composed("-m", "model=sdxl", "--output-path", "c")) == 1


DUMPS = ["/tmp/perf.json", "a/perf.json", "..", "p/", "job.json", "table.md", "runs.csv", "generated_image_0.json"]


@pytest.mark.parametrize("name", DUMPS)
def test_a_perf_dump_stays_in_the_jobs_folder_beside_its_results(sglang, name):
    done = sglang("generate", "-m", "model=sdxl", "--perf-dump-path", name, "--output-path", "sweep")
    assert done.code == 2
    assert done.lines[-1].endswith(f"give it a file name that no other result has, not '{name}'")
    assert not Path("sweep").exists()


def test_a_perf_dump_that_a_file_or_a_sweep_names_is_refused_as_early(sglang):
    Path("file.json").write_text('{"model": "sdxl", "perf_dump_path": "a/b.json"}')
    for words in (("--config", "file.json"), ("model=sdxl", "output.perf_dump_path=a.json,a/b.json")):
        done = sglang("generate", "-m", *words, "--output-path", "sweep")
        assert (done.code, "that no other result has, not 'a/b.json'" in done.lines[-1]) == (2, True)


@pytest.mark.whole
def test_a_perf_dump_may_have_its_own_name(composed):
    (job,) = composed("-m", "model=sdxl", "--perf-dump-path", "speed.json", "--output-path", "sweep")
    assert job.run.output.perf_dump_path == str(Path("sweep/0/speed.json").absolute())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sampling.seed=1,foo",), "sampling.seed: 'foo' is not an integer"),
        (("sampling.sed=1,2",), "Unknown key 'sampling.sed'; did you mean 'sampling.seed'?"),
        (("parallel=single,tp22",), "Unknown option 'tp22' of the group 'parallel'; did you mean 'tp2'?"),
        (("output.path=a,b",), "output.path is the folder of the whole sweep and cannot be swept"),
        (("output.path=a", "hydra.sweep.dir=b"), "both name the folder of the sweep"),
        (("hydra.sweep.subdir=x",), "'hydra.sweep.subdir=x' has no effect in a multirun"),
        (("hydra.run.dir=x",), "'hydra.run.dir=x' has no effect in a multirun"),
        (("hydra.mode=RUN",), "--multirun and hydra.mode=RUN exclude each other"),
        (("hydra/launcher=joblib2",), "pip install 'sglang-gen[launchers]'"),
        (("hydra.sweeper.params.x=1",), "ERROR: "),
        (("--output-path", "taken/sweep"), "taken"),
        (("--config", "missing.json"), "The file missing.json does not exist"),
        (("sampling.seed=interval(1,2)",), "does not support sweep type"),
    ],
)
def test_a_wrong_sweep_is_refused_before_any_job(sglang, words, sentence):
    Path("taken").write_text("a file")
    done = sglang("generate", "-m", "model=sdxl", *words)
    assert done.code == 2, done.err
    assert sentence in done.lines[-1]
    assert "Traceback" not in done.err
    assert not any("Job 1" in line for line in done.lines)


def test_a_flag_that_the_sweep_file_sets_is_refused(sglang, sweep_file):
    done = sglang("generate", *sweep_file, "--seed", "3")
    assert (done.code, "sampling.seed is given twice, by --seed and by the sweep seeds" in done.err) == (2, True)


@pytest.mark.whole
@pytest.mark.parametrize("name", [None, "mine.json"])
def test_the_record_of_a_job_repeats_its_picture_and_leaves_the_sweeps_dump_alone(pipelines, sglang, name):
    words = ("-m", "--model-path", pipelines["sd15"], "--prompt", "x", *SMALL, "--output-path", "sweep")
    own = () if name is None else ("--perf-dump-path", name)
    assert sglang("generate", *words, *own, "sampling.guidance_scale=2").code == 0
    kept = Path("sweep/0", name or "perf.json")
    dump = kept.read_bytes()
    done = sglang("generate", "--config", "sweep/0/generated_image_0.json", "--output-path", "again")
    assert done.code == 0, done.err
    assert Path("again/generated_image_0.png").exists()
    assert kept.read_bytes() == dump


@pytest.mark.whole
def test_sweeps_of_one_record_have_a_folder_each_where_the_run_named_none(composed, tmp_path):
    sources = {"output.path": "default", "output.perf_dump_path": "flag"}
    run = {"output": {"path": "outputs/", "perf_dump_path": "p.json"}, "sampling": {"prompt": "x", "seed": 1}}
    Path("record.json").write_text(json.dumps({"schema_version": 1, "run": run, "sources": sources}))
    jobs = composed("-m", "--config", "record.json", "sampling.guidance_scale=2,4")
    folders = [Path(job.run.output.path) for job in jobs]
    assert folders[0].parent.parent == Path("outputs/multirun").absolute()
    assert [path.name for path in folders] == ["0", "1"]
    assert [Path(job.run.output.perf_dump_path).name for job in jobs] == ["perf.json", "perf.json"]


def test_a_full_disk_is_a_failure_of_the_sweep_and_no_wrong_request(sglang, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hydra.core.plugins.Plugins.instantiate_sweeper", full)
    done = sglang("generate", "-m", "--prompt", "x", "sampling.seed=1,2", "--output-path", "sweep")
    assert done.code == 1
    assert done.lines[-1] == "ERROR: The folder of the sweep cannot be written: No space left on device"


@pytest.mark.whole
def test_a_primary_configuration_that_is_nested_too_deeply_is_one_sentence(sglang):
    Path("deep.yaml").write_text("[" * 3000)
    done = sglang("generate", "--config-dir", ".", "--config-name", "deep", "--prompt", "x")
    assert (done.code, done.lines) == (2, ["ERROR: The configuration is nested too deeply"])


@pytest.mark.slow
def test_jobs_of_different_layouts_follow_each_other_and_each_starts_its_own_ranks(sglang, pipelines):
    done = sglang("generate", "-m", "--model-path", pipelines["sd15"], "--prompt", "x", *SMALL, "--seed", "1",
                  "--dtype", "float32", "--output-path", "sweep", "parallel=single,tp2,ring2")  # fmt: skip
    assert (done.code, done.lines[-1]) == (0, "INFO: Multirun: 3 of 3 jobs succeeded"), done.err
    records = [read(f"sweep/{number}/generated_image_0.json")["effective"]["parallel"] for number in range(3)]
    assert [(each["tp"], each["ring"]) for each in records] == [(1, 1), (2, 1), (1, 2)]


def test_a_sweep_says_once_what_holds_for_all_of_its_jobs(sglang):
    done = sglang("generate", "--prompt", "a", "-m", "sampling.guidance_scale=1,2,3", "dry_run=true")
    assert done.code == 0, done.err
    assert sum("No model given" in line for line in done.lines) == 1
    assert sum("jobs without a seed use seed" in line for line in done.lines) == 1
