"""What the native engine cannot do is refused before it reads a weight, and by a dry run in the same words."""

import pytest
from native import runner, with_scheduler
from PIL import Image
from safetensors.torch import save_file
from torch import zeros

from sglang_gen.backends.diffusers import engine
from sglang_gen.backends.native import engine as native_engine
from sglang_gen.hub import resolve


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("picture.png")
    save_file({"noise": zeros(4, 3, 3)}, "noise.safetensors")
    save_file({"other": zeros(1)}, "other.safetensors")


@pytest.fixture
def no_weights(monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(native_engine, "read_components", read)
    monkeypatch.setattr(native_engine, "build", read)


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("sd3", ("attention=sage",), "attention.backend: 'sage' needs the package sageattention"),
        ("sd3", ("attention=flex", "attention.backend_config={windw: 3}"), "unknown key 'windw'"),
        ("sd3", ("--image-path", "nope.png"), "--image-path: the image nope.png does not exist"),
        ("sd3", ("--image-path", "picture.png", "--diffusers-kwargs", '{"strength": 0}'), "leaves none of 3 steps"),
        ("sd3", ("--image-path", "picture.png", "sampling.guidance_interval=[0,0.2]"), "lies before the last 2 of 3"),
        ("sd3", ("sampling.latents=noise.safetensors",), "holds noise of shape [1, 4, 3, 3]"),
        ("flux", ("sampling.latents=other.safetensors",), "holds no tensor 'noise'"),
        ("sd3", ("sampling.max_sequence_length=600",), "takes at most 512"),
        ("sd3", ("compile=regional",), "needs a C++ compiler"),
    ],
)
def test_a_request_that_cannot_be_met(run, files, no_weights, monkeypatch, name, words, said):
    if "compile" in words[0]:
        monkeypatch.setenv("CXX", "no-such-compiler")
    refused = [run(name, *words, *more, "--backend", "sglang") for more in ((), ("dry_run=true",))]
    assert [done.code for done in refused] == [2, 2]
    assert all(said in done.lines[-1] for done in refused), [done.err for done in refused]


def test_a_scheduler_that_cannot_sample_the_model(pipelines, run, no_weights):
    folder = with_scheduler(pipelines["flux"], "EulerDiscreteScheduler")
    for more in ((), ("dry_run=true",)):
        done = run(folder, *more)
        assert done.code == 2
        assert "EulerDiscreteScheduler does not integrate a flow" in done.lines[-1]


def test_a_model_of_the_hub_is_not_downloaded_for_a_refusal(sglang, monkeypatch):
    def find(*_):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(resolve, "find_weights", find)
    done = sglang("generate", "model=sd15", "--prompt", "a cat", "--image-path", "nope.png", "--dtype", "float32")
    assert done.code == 2
    assert "nope.png does not exist" in done.lines[-1]


@pytest.mark.parametrize("words", [("--image-path", "nope.png"), ("sampling.latents=nope.safetensors",)])
def test_the_files_of_a_request_on_diffusers(run, monkeypatch, words):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(engine, "_read", read)
    for more in ((), ("dry_run=true",)):
        done = run("sd15", *words, *more, "--backend", "diffusers")
        assert done.code == 2
        assert "nope" in done.lines[-1]
