"""What libraries only log about a result is said in our own words, and nothing else of theirs is shown."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

SIZE = ("--height", "32", "--width", "32", "--seed", "7", "--dtype", "float32")
LONG = " ".join("abcdefghijklmnopqrstuvwxyz" * 4)


@pytest.fixture
def warned(pipelines, sglang):
    """Runs a request and returns its warnings; every line must be one of ours."""

    def run(name: str, *words: object, steps: int = 1) -> list[str]:
        words = ("--num-inference-steps", steps, *SIZE, *words)
        words = words if "--prompt" in words else (*words, "--prompt", "a cat")
        done = sglang("generate", "--model-path", pipelines.get(name, name), *words)
        assert done.code == 0, done.err
        assert all(line.startswith(("INFO: ", "WARNING: ")) for line in done.lines)
        return [line.removeprefix("WARNING: ") for line in done.lines if line.startswith("WARNING: ")]

    return run


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_both_backends_say_what_a_text_encoder_does_not_see(warned, name):
    """Those of diffusers' pipelines that truncate without a word too."""
    words = (name, "--prompt", LONG, *(("sampling.max_sequence_length=64",) if name == "flux" else ()))
    ours, theirs = (warned(*words, "--backend", backend) for backend in ("sglang", "diffusers"))
    assert len(ours) == 2
    assert all("does not see: " in line for line in ours)
    assert theirs == ours
    assert warned(name, "--backend", "diffusers") == []


@pytest.fixture(scope="session")
def wan(tmp_path_factory) -> Path:
    return tiny.wan(tmp_path_factory.mktemp("wan") / "tiny-wan")


@pytest.mark.whole
def test_a_pipeline_that_truncates_silently_is_reported_too(warned, wan):
    lines = warned(wan, "--prompt", LONG, "sampling.max_sequence_length=32", "--num-frames", "5")
    assert len([line for line in lines if " takes 32 tokens and does not see: " in line]) == 1


@pytest.mark.whole
def test_a_number_of_frames_that_a_pipeline_rounds_is_reported(warned, wan):
    rounded = "sampling.num_frames is 8, and WanPipeline made 9"
    assert rounded in warned(wan, "--num-frames", "8")
    assert rounded not in warned(wan, "--num-frames", "9")


@pytest.mark.whole
def test_arguments_that_no_attention_processor_takes_have_no_effect(warned):
    given = {"joint_attention_kwargs": {"unknown": 1, "scale": 0.5}}
    assert warned("flux", "--backend", "diffusers", "--diffusers-kwargs", json.dumps(given)) == [
        "--diffusers-kwargs: joint_attention_kwargs.unknown has no effect: no attention processor takes it",
        "--diffusers-kwargs: joint_attention_kwargs.scale has no effect: adapters are merged with lora.scale",
    ]


@pytest.fixture
def singlestep(pipelines) -> Path:
    """SD 1.5 with a scheduler that changes its own settings, and with a key that no scheduler knows."""
    made = shutil.copytree(pipelines["sd15"], Path("singlestep"))
    scheduler = {"_class_name": "DPMSolverSinglestepScheduler", "lower_order_final": False, "solver_order": 2,
                 "final_sigmas_type": "sigma_min", "invented": 1, "use_karras_sigmas": False}  # fmt: skip
    for path, changes in {
        made / "model_index.json": {"scheduler": ["diffusers", scheduler["_class_name"]]},
        made / "scheduler" / "scheduler_config.json": scheduler,
    }.items():
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return made.resolve()


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_settings_that_a_scheduler_replaces_or_ignores_are_named(warned, singlestep, backend):
    replaced = "DPMSolverSinglestepScheduler runs 3 steps with lower_order_final=True in place of False"
    ignored = "The scheduler's config has keys that DPMSolverSinglestepScheduler ignores (invented); "
    lines = warned(singlestep, "--backend", backend, steps=3)
    assert replaced in lines
    (line,) = [line for line in lines if line != replaced]
    assert line.startswith(ignored)
    assert replaced not in warned(singlestep, "--backend", backend, steps=2)
