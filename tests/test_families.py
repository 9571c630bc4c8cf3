"""A family is described by its folder alone: the contract holds, and no module elsewhere names a model."""

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch

from sglang_gen.families import registry
from sglang_gen.families.contract import Spec
from sglang_gen.families.examples_contract import Examples
from sglang_gen.families.pipeline_contract import Pipeline

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent.name for path in (ROOT / "sglang_gen" / "families").glob("*/__init__.py"))
SPECS = {spec.name: spec for spec in registry.specs()}


def test_every_folder_is_a_family_and_the_largest_come_first():
    assert sorted(SPECS) == FOLDERS
    counts = [len(spec.text_encoders) for spec in registry.specs()]
    assert counts == sorted(counts, reverse=True)
    assert registry.by_pipeline_class("NoPipeline") is None
    assert registry.by_network_class("NoNetwork") is None
    for spec in registry.specs():
        assert registry.by_name(spec.name) is registry.by_pipeline_class(spec.pipeline_class) is spec
        alike = registry.by_network_class(spec.network_classes[0])
        assert (alike.heads, alike.patch, alike.most_patches) == (spec.heads, spec.patch, spec.most_patches)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_is_frozen_and_names_components_that_it_has(name):
    spec = SPECS[name]
    assert type(spec) is Spec
    for each in fields(Spec):
        with pytest.raises(FrozenInstanceError):
            setattr(spec, each.name, None)
    with pytest.raises(TypeError):
        spec.components["another"] = ()
    known = {**spec.components, **spec.optional}
    assert {spec.network, "vae", "scheduler"} <= spec.components.keys()
    assert spec.network_classes
    assert set(spec.file_prefixes) <= set(spec.text_encoders) <= known.keys()


@pytest.mark.parametrize("name", SPECS)
def test_a_pipeline_fulfils_the_contract_and_builds_the_tiny_network_and_its_variants(name):
    """Every tensor of ours comes from one of diffusers' checkpoint, and limits of the spec are those of the network."""
    pipeline, examples = registry.pipeline(SPECS[name]), registry.examples(SPECS[name])
    assert isinstance(pipeline, Pipeline)
    assert isinstance(examples, Examples)
    assert not inspect.isabstract(type(pipeline))
    for config in (examples.tiny, *examples.variants.values()):
        assert all(pipeline.spec.settings[key](value) for key, value in config.items())
        with torch.device("meta"):
            network = pipeline.build(config)
        sources = [source for tensor in network.state_dict() for source in pipeline.sources(tensor)]
        assert [tensor for tensor, count in Counter(sources).items() if count > 1] == []
        assert any(isinstance(module, pipeline.regions) for module in network.modules())
        assert pipeline.spec.heads(config)


def test_two_pipelines_of_a_family_share_no_state():
    spec = registry.specs()[0]
    first, second = registry.pipeline(spec), registry.pipeline(spec)
    first.prepare = None
    assert second.prepare is not None


@pytest.mark.whole
def test_specs_and_the_registry_import_no_torch():
    code = (
        "import sys; from sglang_gen.families import registry, encoder_sizes, text_encoders, nunchaku_classes;"
        "assert len(registry.specs()) >= 4 and registry.by_network_class('none') is None;"
        "print([name for name in ('torch', 'numpy', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MODEL = re.compile(r"flux|sd3|sdxl|stable.?diffusion|unet|clip|t5", re.IGNORECASE)
APART = re.compile(r"clip_skip|clip_sample|clipp(ed|ing)", re.IGNORECASE)  # settings, and words
# Left out: families and networks; training of the embedded model, which runs no family; texts of planted bugs.
LEFT_OUT = ("sglang_gen/families/", "sglang_gen/models/", "tools/landscape/", "tools/planted.py")
EXAMPLE = "the example of a command in help names a preset"
COMPONENT = "a name of a component in model_index.json, which diffusers gives"
SENTENCE = "a refusal of the diffusers backend says what the library cannot cache"
METHOD = "DeepCache is a method for UNets, which it and its refusals name"
ENGINE = "the name of another engine, of its package and of its class"
REVIEWED: dict[tuple[str, str], str] = {  # (module, text that stands in it) -> reason
    ("sglang_gen/types.py", "unet"): COMPONENT,
    ("sglang_gen/hub/single_file.py", "unet"): COMPONENT,
    ("sglang_gen/config/help.py", "model=sdxl parallel=sp2_tp2"): EXAMPLE,
    ("sglang_gen/config/help.py", "model=sdxl --prompt"): EXAMPLE,
    ("sglang_gen/backends/diffusers/cache.py", " has a UNet"): SENTENCE,
    ("sglang_gen/backends/native/native_cache.py", "UNet"): METHOD,
    ("sglang_gen/engine/caching/deep_cache.py", "UNet"): METHOD,
    ("sglang_gen/plan/deep_schedule.py", "UNet"): METHOD,
    ("sglang_gen/backends/native/safety_checker.py", "clip_input"): "an argument of diffusers' safety checker",
    ("sglang_gen/hub/component_folder.py", "ByT5"): "a tokenizer of transformers that has no vocabulary file",
    ("tools/bench/single_file.py", "stable-diffusion.cpp"): ENGINE,
    ("tools/bench/single_file.py", "stable_diffusion_cpp"): ENGINE,
    ("tools/bench/single_file.py", "StableDiffusion"): ENGINE,
    ("sglang_gen/env.py", "transformer_flux.py"): "a file that tells two packages named nunchaku apart",
}


def texts(tree: ast.AST) -> Iterator[str]:
    """Identifiers and strings of a module, docstrings included; `clip` as a function of numbers is left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr != "clip":
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.arg, ast.keyword)):
            yield node.arg or ""
        elif isinstance(node, ast.alias):
            yield from (node.name, node.asname or "")
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def names_of_models(code: str) -> list[str]:
    """The texts of a module that name a model, spaced as in one line."""
    lines = (" ".join(text.split()) if "\n" in text else text for text in texts(ast.parse(code)))
    return [line for line in lines if MODEL.search(APART.sub("", line))]


def modules() -> dict[str, Path]:
    paths = [path for folder in ("sglang_gen", "tools", "tests/lib") for path in (ROOT / folder).rglob("*.py")]
    named = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {name: path for name, path in sorted(named.items()) if not name.startswith(LEFT_OUT)}


def test_no_module_outside_of_families_and_networks_names_a_model():
    known, seen, wrong = modules(), set(), []
    assert len(known) >= 170
    for name, path in known.items():
        for text in names_of_models(path.read_text(encoding="utf-8")):
            entries = {(module, part) for module, part in REVIEWED if module == name and part in text}
            seen |= entries
            wrong += [] if entries else [f"{name}: {text[:100]}"]
    assert wrong == []
    assert seen == REVIEWED.keys()
    assert len(REVIEWED) <= 20


@pytest.mark.parametrize(
    "code",
    ['x == "FluxPipeline"', "class SD3Thing: ...", "from a.unet import b", "import t5", "def f(clip): ...",
     "f(unet=1)", "x.sdxl", '"""Of Stable Diffusion."""', "f'{x} has a UNet'", "async def clip(): ..."],
)  # fmt: skip
def test_a_name_of_a_model_is_found_wherever_it_stands(code):
    assert names_of_models(code)


def test_words_that_hold_such_letters_are_no_names():
    assert names_of_models("clip_skip = clipped + f(clip_sample=np.clip(x, 0, 1))  # of a UNet") == []
