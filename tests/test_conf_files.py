"""Every YAML of conf/ composes, and every option of every group plans or is refused in one sentence."""

import re
from pathlib import Path

import pytest
import yaml

from sglang_gen import env
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.schema import leaves
from sglang_gen.errors import UserError
from sglang_gen.hub import resolve
from sglang_gen.plan import checks, make

FILES = sorted(env.conf_dir().rglob("*.yaml"))
OPTIONS = [path for path in FILES if path.name != "config.yaml"]
GROUPS = {
    "attention", "backend", "cache", "compile", "experiment", "lora", "machine", "model", "offload", "output",
    "parallel", "perf", "quality", "quant", "sampling", "sweep", "tracking",
}  # fmt: skip


def name(path: Path) -> str:
    return f"{path.parent.name}={path.stem}"


def test_every_file_is_seen():
    presets = [path for path in FILES if path.parent.name == "model"]
    assert len(FILES) - len(presets) == 65
    assert len(presets) >= 13  # a model adds one
    assert {path.parent.name for path in OPTIONS} == GROUPS


@pytest.mark.parametrize("path", OPTIONS, ids=name)
def test_every_file_says_in_its_first_line_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert re.match(r"# \S.{8}", lines[0])


REFUSALS = ("not available in this version", "this network has layers of", "The native engine cannot run this",
            "needs a GPU", "needs cache.plan_file")  # fmt: skip


@pytest.mark.parametrize("path", OPTIONS, ids=name)
def test_every_option_plans_or_is_refused_in_one_sentence(path):
    words = [name(path), *([] if path.parent.name == "model" else ["model=sdxl"])]
    flags = {"model.path": "x/y"} if path.stem == "custom" else {}
    if "quality.manifest" not in _keys(path) or path.stem == "none":
        words, flags = [*words, "sampling.num_samples=4"], {**flags, "sampling.prompt": "x"}
    composed = compose(Choices(tuple(words), flags))
    preset = composed.run.model.preset or "sdxl"
    folder = env.preset_configs("sd3_medium" if preset == "landscape" else preset)
    if not folder.is_dir():  # the preset of a model whose component configs are not packaged
        folder = env.preset_configs("sdxl")
    try:
        checks.check_request(composed)
        planned = make.make_plan(composed, resolve.read_card(folder, preset, weights=False))
    except UserError as error:
        sentence = str(error)
        assert any(words in sentence for words in (*REFUSALS, f"quant={path.stem}")), sentence
        assert "\n" not in sentence
        changed = [key for key in _keys(path) if key in sentence]
        assert changed or path.parent.name in ("backend", "parallel", "quant"), sentence
    else:
        assert planned.layout.ranks == (composed.run.parallel.num_gpus if path.parent.name == "parallel" else 1)


def _keys(path: Path) -> list[str]:
    """Config paths that a file sets."""
    content = yaml.safe_load(path.read_text()) or {}
    nested = content if "@package _global_" in path.read_text() else {path.parent.name: content}
    return [f"{group}.{key}" for group, keys in nested.items() if isinstance(keys, dict) for key in keys]


@pytest.mark.parametrize("path", [path for path in OPTIONS if path.parent.name == "model"], ids=name)
def test_every_preset_is_complete(path):
    model = yaml.safe_load(path.read_text())["model"]
    if path.stem == "custom":
        assert model == {"preset": None}
        return
    assert model["preset"] == path.stem
    assert model["example_prompt"]
    assert path.stem == "landscape" or model["path"].count("/") == 1


def test_no_file_names_a_class_or_a_key_outside_the_schema():
    known = set(leaves())
    for path in OPTIONS:
        assert "_target_" not in path.read_text()
        assert set(_keys(path)) - {"defaults"} <= known, path
