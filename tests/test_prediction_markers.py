"""Markers in single files that say what the network predicts."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from cases import mostly_slow
from native import assert_same, error, record, tensors
from original_layout import save
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglang_gen.hub import prediction_markers
from sglang_gen.hub.safetensors_header import Header, Tensor
from sglang_gen.types import Component

SMALL = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7",
         "--dtype", "float32", "--guidance-scale", "1", "output.latents=true")  # fmt: skip
EMPTY = torch.zeros(0)


@pytest.fixture(scope="module")
def pipelines(pipelines, tmp_path_factory):
    """With an SDXL whose text encoders differ in width, by which diffusers tells them apart in a file."""
    return pipelines | {"sdxl": tiny.sdxl(tmp_path_factory.mktemp("wide") / "sdxl", widths=(16, 48))}


@pytest.fixture
def marked(pipelines):
    """A single file of a tiny pipeline with more tensors and metadata, and the words that name it."""

    def make(name: str, metadata: dict[str, str] | None = None, **markers: torch.Tensor) -> tuple[object, ...]:
        file = save(pipelines[name], Path(f"{name}.safetensors"))
        with safe_open(file, framework="pt") as opened:
            before = opened.metadata() or {}
        save_file(load_file(file) | markers, file, before | (metadata or {}))
        return "--model-path", file, f"model.configs={pipelines[name]}"

    return make


def scheduler_of(sglang, *words: object, folder: str) -> dict:
    done = sglang("generate", *SMALL, *words, "--output-path", folder)
    assert done.code == 0, done.err
    return record(folder)["effective"]["scheduler_config"]


@pytest.mark.whole
@pytest.mark.parametrize("backend", mostly_slow(["sglang", "diffusers"], "sglang"))
def test_a_file_with_the_markers_gives_the_latents_of_a_folder_whose_scheduler_says_so(
    pipelines, marked, sglang, backend
):
    words = marked("sdxl", v_pred=EMPTY, ztsnr=EMPTY)
    folder = Path(shutil.copytree(pipelines["sdxl"], "model"))
    config = folder / "scheduler" / "scheduler_config.json"
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    ours = scheduler_of(sglang, *words, "--backend", backend, folder="file")
    theirs = scheduler_of(sglang, "--model-path", folder, "--backend", backend, folder="folder")
    assert {key: ours[key] for key in settings} == settings
    assert {key: theirs[key] for key in settings} == settings
    # weights begin elsewhere in a file, by which a product rounds otherwise; two steps from a sigma of 4096 amplify it
    assert_same("file", "folder", 1, tolerance=1e-3)
    scheduler_of(sglang, "--model-path", pipelines["sdxl"], "--backend", backend, folder="epsilon")
    assert error(tensors("file")["latents"], tensors("epsilon")["latents"]) > 0.1


@pytest.mark.whole
def test_the_log_says_which_marker_set_the_scheduler(marked, sglang):
    words = marked("sdxl", v_pred=EMPTY)
    done = sglang("generate", *SMALL, *words)
    (line,) = [line for line in done.lines if "marker" in line]
    assert line == (
        "INFO: sdxl.safetensors has the marker v_pred: its scheduler is EulerDiscreteScheduler with "
        "prediction_type=v_prediction"
    )
    dry = sglang("generate", *SMALL, *words, "dry_run=true")
    assert line in dry.lines


@pytest.mark.whole
def test_what_the_user_says_of_the_scheduler_wins_over_a_marker(pipelines, marked, sglang):
    words = marked("sdxl", v_pred=EMPTY)
    paths = json.dumps({"scheduler": f"{pipelines['sdxl']}/scheduler"})
    given = scheduler_of(sglang, *words, "--component-paths", paths, folder="component")
    assert given.get("prediction_type", "epsilon") == "epsilon"
    setting = json.dumps({"prediction_type": "epsilon"})
    given = scheduler_of(sglang, *words, "--diffusers-kwargs", setting, folder="setting")
    assert given["prediction_type"] == "epsilon"


def test_a_scheduler_that_cannot_rescale_its_betas_gives_way_to_one_that_can(marked, sglang):
    words = marked("sd15", v_pred=EMPTY, ztsnr=EMPTY)  # the tiny pipeline has a PNDMScheduler
    for backend in ("sglang", "diffusers"):
        found = scheduler_of(sglang, *words, "--backend", backend, folder=backend)
        assert record(backend)["effective"]["components"]["scheduler"] == "EulerDiscreteScheduler"
        assert (found["rescale_betas_zero_snr"], found["beta_schedule"]) == (True, "scaled_linear")
    assert_same("sglang", "diffusers", 1, tolerance=1e-4)


def test_the_metadata_of_a_file_can_say_it_too(marked, sglang):
    words = marked("sd15", {"modelspec.prediction_type": "v"})
    assert scheduler_of(sglang, *words, folder="v")["prediction_type"] == "v_prediction"


@pytest.mark.whole
def test_markers_of_edm_set_its_scheduler_and_its_noise_levels(marked, sglang):
    levels = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.004)}
    words = marked("sdxl", **levels)
    for backend in ("sglang", "diffusers"):
        found = scheduler_of(sglang, *words, "--backend", backend, folder=backend)
        assert record(backend)["effective"]["components"]["scheduler"] == "EDMEulerScheduler"
        assert found["prediction_type"] == "v_prediction"
        assert (found["sigma_max"], found["sigma_data"]) == (100.0, 1.0)
        assert found["sigma_min"] == pytest.approx(0.004)
    assert_same("sglang", "diffusers", 1, tolerance=1e-4)


def test_schedulers_of_flow_matching_are_left_alone():
    component = Component("diffusers", "FlowMatchEulerDiscreteScheduler", config={"shift": 3.0})
    header = Header({"v_pred": Tensor("F32", (0,))}, {})
    assert prediction_markers.scheduler(component, Path("x"), header) == (component, None)


def test_the_schedulers_that_rescale_are_those_of_diffusers():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith(("Flax", "_"))]
    takes = [
        name for name in names
        if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, name).__init__).parameters
    ]  # fmt: skip
    assert len(names) > 20
    assert set(prediction_markers.RESCALING) <= set(takes)
