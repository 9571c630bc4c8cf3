"""A scheduler's settings with which its noise levels are not defined are refused in the plan."""

import json
import shutil

import pytest

BACKENDS = pytest.mark.parametrize("backend", ["sglang", "diffusers"])
SHIFT = "; it must be a number above 0"
CHANGES = [
    ("sd3", {"shift": 0}, f"shift is 0{SHIFT}"),
    ("flux", {"shift": 0.0}, f"shift is 0.0{SHIFT}"),
    ("flux", {"shift": -1.5}, f"shift is -1.5{SHIFT}"),
    ("sd3", {"shift": float("nan")}, f"shift is nan{SHIFT}"),
    ("sd3", {"shift": "high"}, f"shift is high{SHIFT}"),
    ("sd3", {"shift": None}, f"shift is null{SHIFT}"),
    ("sd3", {"shift_terminal": 1}, "shift_terminal is 1; it must be null, or a number of at least 0 and below 1"),
    ("sd3", {"num_train_timesteps": 0}, "num_train_timesteps is 0; it must be an integer above 0"),
    ("sdxl", {"beta_start": float("nan")}, "beta_start is nan; it must be a number between 0 and 1"),
    ("sdxl", {"beta_end": 1e308}, "beta_end is 1e+308; it must be a number between 0 and 1"),
    ("sdxl", {"prediction_type": {}}, "prediction_type is {}; it must be a text"),
    ("flux", {"use_karras_sigmas": 1e308}, "use_karras_sigmas is 1e+308; it must be true, false or null"),
    ("sdxl", {"trained_betas": 3.5}, "trained_betas is 3.5; it must be null or a list of numbers"),
    ("flux", {"base_image_seq_len": 4096}, "base_image_seq_len and max_image_seq_len are both 4096; they must differ"),
]


@BACKENDS
@pytest.mark.parametrize(("name", "changes", "sentence"), CHANGES)
@pytest.mark.parametrize("dry", [True, False])
def test_a_config_without_noise_levels_is_refused(pipelines, sglang, tmp_path, backend, name, changes, sentence, dry):
    folder = tmp_path / "model"
    shutil.copytree(pipelines[name], folder, symlinks=True)
    path = folder / "scheduler" / "scheduler_config.json"
    config = {"max_image_seq_len": 4096, "use_dynamic_shifting": name == "flux", **json.loads(path.read_text())}
    path.write_text(json.dumps({**config, **changes}))
    words = ("dry_run=true",) if dry else ()
    done = sglang("generate", "--model-path", folder, "--prompt", "a", "--backend", backend, *words)
    assert done.code == 2
    assert done.lines[-1] == f"ERROR: {path}: {sentence}"


def with_scheduler(source, folder, name, **config):
    shutil.copytree(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    return folder


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("name", "config", "what"), [
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "a shift"),
    ("EulerDiscreteScheduler", {}, "noise levels of its own and a shift"),
    ("DDIMScheduler", {}, "noise levels of its own and a shift"),
])  # fmt: skip
def test_a_scheduler_that_does_not_take_the_pipelines_levels_is_refused(
    pipelines, sglang, tmp_path, name, config, what, dry
):
    folder = with_scheduler(pipelines["flux"], tmp_path / "model", name, **config)
    words = ("--backend", "diffusers", *(("dry_run=true",) if dry else ()))
    done = sglang("generate", "--model-path", folder, "--prompt", "a", *words)
    assert done.code == 2
    assert done.lines[-1].startswith(f"ERROR: FluxPipeline gives its scheduler {what}")
    assert f", which {name} does not take with this configuration; " in done.lines[-1]


@pytest.mark.whole
def test_a_scheduler_with_a_dynamic_shift_samples_flux_on_diffusers(pipelines, sglang, tmp_path):
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    folder = with_scheduler(pipelines["flux"], tmp_path / "model", "DPMSolverMultistepScheduler", **config)
    words = ("--backend", "diffusers", "--height", 32, "--width", 32, "--num-inference-steps", 2)
    done = sglang("generate", "--model-path", folder, "--prompt", "a", *words)
    assert done.code == 0, done.err


@pytest.mark.parametrize("value", [0, -3])
def test_a_shift_of_zero_in_the_kwargs_is_refused(pipelines, sglang, value):
    kwargs = json.dumps({"shift": value})
    words = ("--backend", "diffusers", "--diffusers-kwargs", kwargs)
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *words)
    assert done.code == 2
    assert done.lines[-1] == f"ERROR: --diffusers-kwargs: shift is {value}{SHIFT}"


def test_a_network_without_levels_is_refused(pipelines, sglang, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pipelines["sd3"], folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": []}))
    done = sglang("generate", "--model-path", folder, "--prompt", "a", "dry_run=true")
    assert (done.code, done.lines[-1]) == (
        2,
        f"ERROR: {path}: block_out_channels is an empty list; it must be an integer or a list of integers",
    )
