"""The benchmark beside stable-diffusion.cpp, with a stand-in for its package."""

import importlib.util
import sys
from types import SimpleNamespace

import original_layout
import pytest

from tools.bench import single_file

SMALL = ["--size", "32", "--steps", "2", "--rounds", "2"]


@pytest.fixture
def installed(monkeypatch) -> list[dict]:
    """The package as installed; the arguments that it was given."""
    calls: list[dict] = []

    class StableDiffusion:
        def __init__(self, **given: object) -> None:
            calls.append(given)

        def generate_image(self, **given: object) -> None:
            calls.append(given)

    monkeypatch.setitem(sys.modules, single_file.PEER, SimpleNamespace(StableDiffusion=StableDiffusion))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == single_file.PEER or found(name))
    return calls


def test_without_a_file_or_the_package_the_rows_say_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert single_file.table(single_file.parse(["--file", ""])).splitlines()[2:] == [
        "| sglang-gen | no model file |", "| diffusers | no model file |", "| stable-diffusion.cpp | not installed |",
    ]  # fmt: skip


def test_with_the_package_and_no_file_nothing_is_timed(installed):
    assert single_file.table(single_file.parse([])).count("no model file") == 3
    assert installed == []


@pytest.mark.whole
def test_the_three_engines_draw_the_same_request(pipelines, installed, tmp_path):
    file = original_layout.save(pipelines["sd15"], tmp_path / "model.safetensors")
    overrides = (f"model.configs={pipelines['sd15']}", "dtype=float32")
    lines = single_file.table(single_file.parse(["--file", str(file), *SMALL, *overrides])).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| sglang-gen", "| diffusers", "| stable-diffusion.cpp"]
    assert all(float(line.split(" | ")[1].rstrip(" |")) >= 0 for line in lines)
    assert installed[0] == {"model_path": str(file)}
    assert installed[1:] == 3 * [
        {"prompt": single_file.PROMPT, "width": 32, "height": 32, "sample_steps": 2, "seed": 42}
    ]
