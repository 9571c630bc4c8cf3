"""quality.reference=auto: the run that makes a reference, what decides it, and that it is made once."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_gen import env
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import Composed, compose
from sglang_gen.config.schema import Run, leaves, plain
from sglang_gen.errors import RunError
from sglang_gen.hub import resolve
from sglang_gen.launch import kept_reference, launcher
from sglang_gen.plan import exact_run, make
from sglang_gen.types import Plan

QUICK = ("--num-inference-steps", "1", "--height", "32", "--width", "32", "--seed", "7", "perf=light")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def makes(monkeypatch):
    """References are made in this process; the plans of those that were made."""
    made: list[Plan] = []

    def launch(plan: Plan, started: float, fresh: bool = False) -> object:
        if fresh:
            made.append(plan)
        return launcher.here(plan, started)

    monkeypatch.setattr(launcher, "launch", launch)
    return made


def planned(folder: Path, *words: str, **flags: object) -> tuple[Composed, Plan]:
    given = {"model.path": str(folder), "sampling.prompt": "a lake", "sampling.seed": 7, **flags}
    composed = compose(Choices(("quality.reference=auto", *words), given))
    return composed, make.make_plan(composed, resolve.find(composed.run.model, weights=False))


def described(folder: Path, *words: str, **flags: object) -> dict:
    _, plan = planned(folder, *words, **flags)
    run = exact_run.exact(plan)
    return kept_reference._described(plan, run, resolve.find_weights(run))


APPROXIMATE = (
    "sampling.guidance_interval=[0.2,0.8]", "attention=math", "sampling.batch_size=4", "deterministic=true",
    "sampling.guidance_batching=sequential", "compile=regional", "compile.warmup=true", "parallel=tp2",
    "output.latents=true", "perf.repeat=3", "tracking=csv", "log_level=error", "offload=model", "cache=dbcache",
)  # fmt: skip


@pytest.mark.parametrize("words", APPROXIMATE)
def test_a_run_that_differs_in_an_approximation_or_in_rounding_has_the_same_reference(pipelines, words):
    assert described(pipelines["sd3"], words) == described(pipelines["sd3"])


def test_a_run_with_quantization_has_the_reference_of_its_backend(pipelines):
    folder, words = pipelines["sd3"], "quant=int8"  # which only diffusers has
    _, plan = planned(folder, words)
    assert plan.backend == "diffusers"
    assert described(folder, words) == described(folder, "backend=diffusers")
    assert described(folder, words) != described(folder)


@pytest.mark.parametrize(
    "words",
    [
        "sampling.num_inference_steps=7", "sampling.guidance_scale=2", "sampling.height=64", "dtype=bfloat16",
        "backend=diffusers", "sampling.negative_prompt=grey", "sampling.max_sequence_length=20",
        "backend.diffusers_kwargs={clip_skip: 1}",
    ],
)  # fmt: skip
def test_a_run_that_differs_in_what_it_samples_has_another_reference(pipelines, words):
    assert described(pipelines["sd3"], words) != described(pipelines["sd3"])


def test_samples_weights_and_versions_decide_the_reference(pipelines, monkeypatch, tmp_path):
    before = described(pipelines["sd3"])
    assert described(pipelines["sd3"], **{"sampling.seed": 8}) != before
    assert described(pipelines["sd3"], **{"sampling.prompt": "a fox"}) != before
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in pipelines["sd3"].rglob("*"):
        target = copy / path.relative_to(pipelines["sd3"])
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    assert described(copy) == before  # the name of the folder does not matter
    weights = next((copy / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert described(copy) != before
    monkeypatch.setattr(env, "versions", lambda: {"torch": "0"})
    assert described(pipelines["sd3"]) != before


def test_every_setting_of_the_reference_is_decided():
    """A new setting is part of what decides a reference, unless `settings` leaves it out by name."""
    known = {path for path in leaves() if "." in path}
    listed = exact_run.settings(Run())
    absent = {path for path in known if path.split(".")[1] not in listed[path.split(".")[0]]}
    assert absent == {
        "model.path", "model.preset", "model.id", "model.example_prompt", "model.component_paths", "model.configs",
        "quality.manifest", "parallel.timeout_minutes", "quant.transformer_weights_path", "sampling.image_path",
        "sampling.latents",
    }  # fmt: skip


def test_the_reference_is_made_in_one_process_on_the_runs_own_backend_and_dtype(pipelines):
    _, plan = planned(pipelines["sd3"], "parallel=tp2", "dtype=bfloat16", "lora.scale=0.5")
    run = exact_run.exact(plan)
    assert plain(run.parallel) == plain(Run().parallel)
    assert (run.backend.name.name, run.dtype.name, run.device.name) == ("sglang", "bfloat16", "cpu")
    assert run.lora.scale == 0.5  # an adapter is part of the model
    assert (run.quality.reference, run.sampling.seed) == (None, 7)


def test_a_drawn_seed_has_no_kept_reference(sglang):
    done = sglang("generate", "--prompt", "a lake", "quality.reference=auto", "dry_run=true")
    assert "the seed of this run is drawn; set --seed or quality.manifest" in done.lines[-1]
    assert done.code == 2


def test_a_model_with_quantized_weights_has_no_reference(pipelines):
    composed, plan = planned(pipelines["sd3"])
    transformer = plan.card.components["transformer"]
    config = {**transformer.config, "quantization_config": {"quant_method": "torchao"}}
    card = replace(plan.card, components={**plan.card.components, "transformer": replace(transformer, config=config)})
    with pytest.raises(ValueError, match=r"the transformer of .* is quantized already, so a reference without"):
        make.make_plan(composed, card)


def test_torchrun_makes_no_reference(pipelines, monkeypatch):
    place = env.Torchrun(rank=0, ranks=2, local=0, here=2, node=0)
    monkeypatch.setattr(env, "torchrun", lambda: place)
    with pytest.raises(ValueError, match="in one process, and torchrun has started 2; name a folder"):
        planned(pipelines["sd3"])


@pytest.mark.whole
def test_a_reference_is_made_once_and_kept(pipelines, sglang, makes):
    words = ("generate", "--model-path", pipelines["sd3"], "--prompt", "a lake", *QUICK, "quality.reference=auto",
             "--perf-dump-path", "perf.json")  # fmt: skip
    first = sglang(*words)
    assert first.code == 0, first.err
    assert "INFO: Making the quality reference: 1 image without cache, quantization" in first.err
    assert "INFO: Quality against the reference without approximations: identical" in first.err
    (folder,) = Path(env.cache_dir(), "references").glob("*/")
    found = json.loads(Path("perf.json").read_text())["quality"]
    assert (found["verdict"], found["reference"]) == ("identical", str(folder))
    assert json.loads((folder / "reference.json").read_text())["samples"] == [["a lake", None, 7]]
    assert json.loads(Path("outputs/generated_image_0.json").read_text())["run"]["quality"]["reference"] == "auto"
    second = sglang(*words, "attention=math", "sampling.guidance_interval=[0,0.6]", "--output-path", "second")
    assert second.code == 0, second.err
    assert f"INFO: Quality reference kept from an earlier run: {folder}" in second.err
    assert len(makes) == 1


@pytest.mark.whole
def test_a_sweep_makes_its_reference_once_and_shows_each_verdict(pipelines, sglang, makes):
    Path("two.jsonl").write_text('{"prompt": "a lake"}\n{"prompt": "a fox"}\n')
    done = sglang("generate", "--model-path", pipelines["sd3"], *QUICK[2:6], "perf=light", "quality.manifest=two.jsonl",
                  "quality.reference=auto", "sampling.guidance_scale=7", "--num-inference-steps", "2", "-m",
                  "sampling.guidance_interval=null,[0,0.5]", "--output-path", "sweep")  # fmt: skip
    assert done.code == 0, done.err
    assert len(makes) == 1
    assert [len(batch) for batch in makes[0].batches] == [1, 1]
    table = Path("sweep/table.md").read_text()
    assert "verdict" in table
    assert "approximate" in table
    verdicts = [json.loads(Path("sweep", job, "perf.json").read_text())["quality"]["verdict"] for job in "01"]
    assert verdicts == ["identical", "approximate"]
    assert [line.split(",")[-3] for line in Path("sweep/table.csv").read_text().splitlines()] == ["verdict", *verdicts]
    assert "worst image " in done.err


@pytest.mark.whole
def test_a_reference_that_cannot_be_made_leaves_nothing(pipelines, sglang, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(launcher, "launch", fails)
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *QUICK, "quality.reference=auto")
    assert done.lines[-1] == "ERROR: quality.reference=auto: the reference cannot be made: the disk is full"
    assert done.code == 1
    assert not list(Path(env.cache_dir(), "references").glob("*/"))


def test_two_processes_do_not_make_the_same_reference_at_once(tmp_path):
    inside, order = threading.Event(), []

    def other() -> None:
        with kept_reference._locked(tmp_path / "key"):
            order.append("other")

    with kept_reference._locked(tmp_path / "key"):
        waiting = threading.Thread(target=other)
        waiting.start()
        inside.wait(0.1)
        order.append("first")
    waiting.join()
    assert order == ["first", "other"]


@pytest.mark.slow
def test_the_embedded_model_repeats_its_reference_and_guidance_in_an_interval_does_not(sglang):
    Path("four.jsonl").write_text("".join(f'{{"prompt": "a lake, {word}"}}\n' for word in ("dawn", "noon", "night")))
    words = ("generate", "quality.manifest=four.jsonl", "quality.reference=auto", "--dtype", "float32", "perf=light",
             "--num-inference-steps", "6")  # fmt: skip
    verdicts = []
    for more in ((), ("sampling.batch_size=3",), ("sampling.guidance_interval=[0.2,0.8]",)):
        done = sglang(*words, *more, "--perf-dump-path", "perf.json")
        assert done.code == 0, done.err
        verdicts.append(json.loads(Path("perf.json").read_text())["quality"]["verdict"])
    assert verdicts[0] == "identical"
    assert verdicts[1] in ("identical", "equal within rounding")
    assert verdicts[2] == "approximate"
