"""Models from a hub: loaded, refused and missing, against a little hub on loopback."""

import json
import shutil
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import diffusers
import huggingface_hub
import little_hub
import numpy as np
import pytest
import torch
from little_hub import LittleHub
from native import edited
from PIL import Image

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "1", "--seed", "7", "--dtype", "float32")
LIMITATION = (
    "ERROR: The generate command is currently only supported for diffusion models. "
    "For language models, use the sglang serve command to start a server and make API requests."
)


@pytest.fixture
def hub(tmp_path, monkeypatch, pipelines) -> Iterator[LittleHub]:
    """A hub with `tiny/sd15`, and nothing in the local cache."""
    little = LittleHub()
    little.repos["tiny/sd15"] = {"main": pipelines["sd15"]}
    little.install(monkeypatch, tmp_path)
    yield little
    little.close()


def picture(number: int = 0) -> np.ndarray:
    return np.asarray(Image.open(f"outputs/generated_image_{number}.png"))


@pytest.mark.whole
def test_a_hub_id_gives_the_picture_of_the_folder(sglang, hub, pipelines):
    for path in ("tiny/sd15", pipelines["sd15"]):
        done = sglang("generate", "--model-path", path, "--prompt", "a", *SMALL)
        assert done.code == 0, done.err
        assert done.lines[0] == f"INFO: Loading model: {path}"
    assert np.array_equal(picture(0), picture(1))
    assert any(name.endswith(".safetensors") for name in hub.files_fetched())
    assert json.loads(Path("outputs/generated_image_0.json").read_text())["run"]["model"]["path"] == "tiny/sd15"


@pytest.mark.whole
def test_revision_chooses_the_files(sglang, hub, pipelines, tmp_path):
    shutil.copytree(pipelines["sd15"], tmp_path / "grey")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "grey", subfolder="vae")
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(vae.decoder.conv_out.bias)
    vae.save_pretrained(tmp_path / "grey" / "vae")
    hub.repos["tiny/sd15"]["grey"] = tmp_path / "grey"
    common = ("generate", "--model-path", "tiny/sd15", "--prompt", "a", *SMALL)
    assert sglang(*common, "--revision", "grey").code == 0
    assert sglang(*common).code == 0
    assert np.unique(picture(0)).tolist() in ([127], [128])
    assert len(np.unique(picture(1))) > 10
    unknown = sglang(*common, "--revision", "gone")
    assert (unknown.code, unknown.lines) == (2, ["ERROR: tiny/sd15 has no revision 'gone'"])


@pytest.mark.whole
def test_a_revision_is_a_branch_a_tag_or_a_commit(sglang, hub, pipelines):
    hub.repos["tiny/sd15"] = {"main": pipelines["sd15"], "v1.0": pipelines["sdxl"], "work/new": pipelines["sdxl"]}
    commit = little_hub._commit("tiny/sd15", "v1.0")
    for number, revision in enumerate(("v1.0", "work/new", commit)):
        done = sglang("generate", "--model-path", "tiny/sd15", "--revision", revision, "--prompt", "a", *SMALL)
        assert done.code == 0, done.err
        effective = json.loads(Path(f"outputs/generated_image_{number}.json").read_text())["effective"]
        assert effective["pipeline"] == "StableDiffusionXLPipeline"
    assert sglang("generate", "--model-path", "tiny/sd15", "--prompt", "a", *SMALL).code == 0
    effective = json.loads(Path("outputs/generated_image_3.json").read_text())["effective"]
    assert effective["pipeline"] == "StableDiffusionPipeline"


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_how_to_log_in(sglang, hub, status):
    hub.refused["tiny/gated"] = (status, "GatedRepo")
    done = sglang("generate", "--model-path", "tiny/gated", "--prompt", "a")
    assert done.code == 2
    assert done.lines == [
        "ERROR: tiny/gated is gated: accept its license on its page on the hub, then log in with 'hf auth login'"
    ]


def test_a_missing_repository_is_one_sentence(sglang, hub):
    done = sglang("generate", "--model-path", "tiny/none", "--prompt", "a")
    assert done.code == 2
    assert done.lines == [
        "ERROR: tiny/none is neither a local folder nor a model on the hub "
        "(if it is private, log in with 'hf auth login')"
    ]
    impossible = sglang("generate", "--model-path", "tiny/no such model", "--prompt", "a")
    assert (impossible.code, len(impossible.lines)) == (2, 1)
    assert "is neither a local folder nor a possible hub id" in impossible.err


def test_pickled_weights_are_refused_on_the_hub_and_in_a_folder(sglang, hub, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "pickled")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    hub.repos["tiny/pickled"] = {"main": folder}
    for path in ("tiny/pickled", folder):
        done = sglang("generate", "--model-path", path, "--prompt", "a", *SMALL)
        assert done.code == 2
        assert "offers no safetensors weights" in done.lines[-1]
        assert "pickled weights are refused" in done.lines[-1]
        assert [line for line in done.lines if line.startswith("ERROR")] == done.lines[-1:]
    assert not any(name.endswith((".bin", ".safetensors")) for name in hub.files_fetched())


def test_weights_that_are_there_in_a_variant_alone_are_named(sglang, hub, pipelines, tmp_path):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "half")
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    hub.repos["tiny/half"] = {"main": folder}
    there = sglang("generate", "--model-path", "tiny/half", "--prompt", "a", *SMALL)
    assert (there.code, "no safetensors weights without a variant (such as fp16)" in there.lines[-1]) == (2, True)
    here = sglang("generate", "--model-path", folder, "--prompt", "a", *SMALL)
    assert (here.code, "holds only variants of its weights (" in here.lines[-1]) == (2, True)


def test_a_hub_that_cannot_be_reached_is_one_sentence_within_seconds(sglang, hub):
    hub.close()
    start = time.monotonic()
    done = sglang("generate", "--model-path", "tiny/sd15", "--prompt", "a")
    assert (done.code, len(done.lines)) == (1, 1)
    assert done.lines[0].startswith("ERROR: tiny/sd15 is not a local folder, is incomplete in the local cache, and c")
    assert "the hub cannot be reached (Connection refused)" in done.lines[0]
    assert time.monotonic() - start < 20  # the hub's own client tries for 23 s


@pytest.mark.whole
def test_a_cached_model_runs_without_the_hub(sglang, hub):
    common = ("generate", "--model-path", "tiny/sd15", "--prompt", "a", *SMALL)
    assert sglang(*common).code == 0
    hub.close()
    done = sglang(*common)
    assert done.code == 0, done.err
    assert np.array_equal(picture(0), picture(1))
    warnings = [line for line in done.lines if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert warnings[0].endswith(": using the copy of tiny/sd15 in the local cache")


def test_a_cache_without_the_weights_is_not_enough(sglang, hub):
    common = ("generate", "--model-path", "tiny/sd15", "--prompt", "a", *SMALL)
    assert sglang(*common, "dry_run=true").code == 0
    hub.close()
    done = sglang(*common)
    assert (done.code, [line for line in done.lines if not line.startswith("INFO")]) == (1, done.lines[-1:])
    assert "is incomplete in the local cache" in done.lines[-1]


def test_offline_mode_of_the_hub_library_is_named(sglang, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = sglang("generate", "--model-path", "tiny/sd15", "--prompt", "a")
    assert (done.code, len(done.lines)) == (1, 1)
    assert done.lines[0].endswith("could not be downloaded: HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_an_answer_of_the_hub_that_is_no_answer_is_told(sglang, hub):
    hub.refused["tiny/sd15"] = (503, "")
    done = sglang("generate", "--model-path", "tiny/sd15", "--prompt", "a")
    assert (done.code, len(done.lines)) == (1, 1)
    assert done.lines[0].endswith("could not be downloaded: the hub answers 503 Service Unavailable")


def test_dry_run_of_an_unknown_id_fetches_configs_only(sglang, hub):
    done = sglang("generate", "--model-path", "tiny/sd15", "--prompt", "a", "dry_run=json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["components"]["unet"] == "UNet2DConditionModel"
    fetched = hub.files_fetched()
    assert "model_index.json" in fetched
    assert "unet/config.json" in fetched
    assert all(name.endswith(".json") and "token" not in name for name in fetched)


OWN = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # of the preset sd15


@pytest.mark.whole
def test_a_preset_is_planned_again_from_what_its_repository_holds(sglang, hub, pipelines):
    missing = {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
    hub.repos[OWN] = {"main": edited(pipelines["sd15"], "other", "model_index.json", **missing)}
    words = ("generate", "model=sd15", "--prompt", "a", *SMALL, "--backend")
    assert json.loads(sglang(*words, "auto", "dry_run=json").out)["effective"]["backend"] == "sglang"
    assert not hub.requests
    reason = "its text_encoder has the class CLIPTextModelWithProjection in place of CLIPTextModel"
    refused = sglang(*words, "sglang")
    assert (refused.code, f"The native engine cannot run this: {reason}" in refused.err) == (2, True)
    lines = sglang(*words, "auto").lines
    assert lines[:2] == [
        f"INFO: Loading model: {OWN}",
        f"INFO: Backend: diffusers (the native engine cannot run this: {reason})",
    ]


@pytest.mark.parametrize("path", ["owner/inpaint", "owner/stable-diffusion-v1-5"])
def test_another_repository_is_described_by_its_own_configs_under_a_preset_too(sglang, hub, pipelines, path):
    other = edited(pipelines["sd15"], "other", "model_index.json", _class_name="StableDiffusionPAGPipeline")
    hub.repos[path] = {"main": other}
    words = ("generate", "--model-path", path, "--model-id", "sd15", "--prompt", "a")
    found = json.loads(sglang(*words, "dry_run=json").out)
    assert (found["pipeline"], found["effective"]["backend"]) == ("StableDiffusionPAGPipeline", "diffusers")
    assert not any(name.endswith(".safetensors") for name in hub.files_fetched())
    refused = sglang(*words, *SMALL, "--backend", "sglang")
    assert (refused.code, "it has no StableDiffusionPAGPipeline" in refused.err) == (2, True)


@pytest.mark.whole
def test_dry_run_of_a_preset_asks_no_hub(sglang, hub):
    done = sglang("generate", "model=sdxl", "dry_run=json")
    assert done.code == 0, done.err
    assert hub.requests == []


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_a_language_model_gets_the_sentence_of_the_page(sglang, hub, tmp_path, architecture):
    folder = tmp_path / "language"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "model.safetensors").write_bytes(b"")
    hub.repos["tiny/language"] = {"main": folder}
    for path in (folder, "tiny/language"):
        done = sglang("generate", "--model-path", path, "--prompt", "a")
        assert (done.code, done.lines) == (2, [LIMITATION])
    assert hub.files_fetched() == ["config.json"]


def test_a_repository_that_is_no_model_at_all_is_refused(sglang, hub, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("nothing")
    hub.repos["tiny/data"] = {"main": tmp_path / "data"}
    done = sglang("generate", "--model-path", "tiny/data", "--prompt", "a")
    assert (done.code, done.lines) == (
        2, ["ERROR: tiny/data is not a diffusers model: it has no model_index.json"]
    )  # fmt: skip


def test_modelscope_without_its_package_names_the_install(sglang, hub, monkeypatch):
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    done = sglang("generate", "--model-path", "tiny/sd15", "--prompt", "a")
    assert done.code == 2
    assert done.lines == ["ERROR: SGLANG_USE_MODELSCOPE=1 needs ModelScope: pip install 'sglang-gen[modelscope]'"]


@pytest.fixture
def modelscope(monkeypatch) -> types.ModuleType:
    """A stand-in for the package `modelscope`, with the names that are used of it."""
    package, inner, errors = (types.ModuleType(name) for name in ("modelscope", "modelscope.hub", "errors"))
    errors.NotExistError = type("NotExistError", (Exception,), {})
    errors.NetworkError = type("NetworkError", (Exception,), {})
    package.hub, inner.errors = inner, errors
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.hub", inner)
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "1")
    return package


def test_modelscope_ids_go_to_modelscope(sglang, hub, pipelines, modelscope):
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=None):
        asked.append((name, revision, allow_patterns, ignore_patterns))
        return str(pipelines["sd15"])

    modelscope.snapshot_download = snapshot_download
    done = sglang("generate", "--model-path", "scope/sd15", "--revision", "v1", "--prompt", "a", *SMALL)
    assert done.code == 0, done.err
    assert {(name, revision) for name, revision, _, _ in asked} == {("scope/sd15", "v1")}
    assert all(not pattern.endswith("/*") for pattern in asked[0][2])  # the plan needs configs only
    assert "unet/*" in asked[-1][2]
    assert "*.bin" in asked[-1][3]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("NotExistError", 2, "ERROR: ModelScope has no scope/sd15"),
        ("NetworkError", 1, "ERROR: ModelScope cannot provide scope/sd15: --log-level debug shows why"),
    ],
)
def test_failures_of_modelscope_are_one_sentence(sglang, modelscope, name, code, sentence):
    def snapshot_download(*_args: object, **_kwargs: object) -> str:
        raise getattr(modelscope.hub.errors, name)("no route")

    modelscope.snapshot_download = snapshot_download
    done = sglang("generate", "--model-path", "scope/sd15", "--prompt", "a")
    assert (done.code, done.lines) == (code, [sentence])
