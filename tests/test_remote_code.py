"""Code that a model repository carries runs only where the user says so; without that nothing of it is imported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers.utils import dynamic_modules_utils
from little_hub import LittleHub
from PIL import Image

SMALL = ("--prompt", "a cat", "--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7",
         "--dtype", "float32")  # fmt: skip
PIPELINE = """
from pathlib import Path
import diffusers
Path({trace!r}).write_text("ran")
class OwnPipeline(diffusers.StableDiffusionPipeline):
    pass
"""
UNET = """
from pathlib import Path
import diffusers
Path({trace!r}).write_text("ran")
class OwnUNet(diffusers.UNet2DConditionModel):
    pass
"""


@pytest.fixture
def trace(tmp_path) -> Path:
    """The file that the code of a repository leaves behind when it runs."""
    return tmp_path / "trace"


@pytest.fixture(autouse=True)
def _own_modules_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(params=["pipeline", "component"])
def repository(request, pipelines, tmp_path, trace) -> Path:
    """The tiny SD 1.5 with a pipeline class, or a UNet class, of its own."""
    folder = shutil.copytree(pipelines["sd15"], tmp_path / f"own-{request.param}")
    index = json.loads((folder / "model_index.json").read_text())
    if request.param == "pipeline":
        index["_class_name"] = ["own_pipeline", "OwnPipeline"]
        (folder / "own_pipeline.py").write_text(PIPELINE.format(trace=str(trace)))
    else:
        index["unet"] = ["own_unet", "OwnUNet"]
        (folder / "unet" / "own_unet.py").write_text(UNET.format(trace=str(trace)))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch, repository):
    """A hub with `tiny/own`, and nothing in the local cache."""
    little = LittleHub()
    little.repos["tiny/own"] = {"main": repository}
    little.install(monkeypatch, tmp_path)
    yield little
    little.close()


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_code_of_a_repository_is_refused_and_not_imported(sglang, hub, repository, trace, where):
    path = repository if where == "folder" else "tiny/own"
    for more in ((), ("dry_run=true",), ("--component-paths", json.dumps({"unet": str(repository / "unet")}))):
        done = sglang("generate", "--model-path", path, *SMALL, *more)
        assert (done.code, len(done.lines)) == (2, 1), done.err
        assert f"{path} runs code from its repository (" in done.err
        assert "own_" in done.err
        assert "read it, then allow it with --trust-remote-code" in done.err
    assert not trace.exists()
    assert not any(name.endswith((".py", ".safetensors")) for name in hub.files_fetched())


@pytest.mark.whole
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_trusted_code_runs_and_gives_the_picture(pipelines, sglang, hub, repository, trace, where):
    path = repository if where == "folder" else "tiny/own"
    done = sglang("generate", "--model-path", path, "--trust-remote-code", *SMALL)
    assert done.code == 0, done.err
    assert trace.read_text() == "ran"
    effective = json.loads(Path("outputs/generated_image_0.json").read_text())["effective"]
    assert {"OwnPipeline", "OwnUNet"} & {effective["pipeline"], effective["components"]["unet"]}
    assert sglang("generate", "--model-path", pipelines["sd15"], *SMALL).code == 0
    first, second = (np.asarray(Image.open(f"outputs/generated_image_{n}.png")) for n in (0, 1))
    assert np.array_equal(first, second)


def test_trust_that_nothing_asks_for_is_a_warning(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sd15"], "--trust-remote-code", *SMALL)
    assert done.code == 0, done.err
    assert f"WARNING: --trust-remote-code has no effect: {pipelines['sd15']} contains no Python code" in done.lines
    assert not [line for line in done.lines if line.startswith("INFO: Backend: ")]  # nor does it choose one


def test_own_code_is_not_replaced_in_silence(sglang, repository):
    flag = ("--pipeline-class-name", "StableDiffusionPipeline")
    if repository.name == "own-component":
        flag = ("--component-paths", json.dumps({"unet": str(repository / "unet")}))
    done = sglang("generate", "--model-path", repository, "--trust-remote-code", *flag, *SMALL)
    assert done.code == 2
    assert "cannot replace" in done.err or "cannot be replaced" in done.err


def test_a_library_that_nobody_knows_is_code_even_without_its_file(pipelines, sglang, tmp_path, monkeypatch):
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "unknown")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["somewhere", "Network"]}))
    Path("somewhere.py").write_text("open('trace', 'w').close()\n")
    monkeypatch.syspath_prepend(".")
    done = sglang("generate", "--model-path", folder, *SMALL)
    assert (done.code, "(unet/somewhere.py)" in done.err) == (2, True)
    assert not Path("trace").exists()


def test_broken_code_is_one_sentence(sglang, repository):
    for path in repository.rglob("own_*.py"):
        path.write_text("class OwnPipeline:\n    def\n")
    done = sglang("generate", "--model-path", repository, "--trust-remote-code", *SMALL)
    assert done.code in (1, 2)
    assert [line for line in done.lines if line.startswith("ERROR")] == done.lines[-1:]
