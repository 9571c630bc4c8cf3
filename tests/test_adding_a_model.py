"""docs/adding_a_model.md adds a model by its files alone: they are written into a copy of the sources, and it runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pages
import pytest
from native import error, picture, tensors

PAGE = pages.ROOT / "docs" / "adding_a_model.md"
SOURCES = pages.sources(PAGE)
COMMANDS = [command.words for command in pages.commands(PAGE) if command.kind == "added"]
COPIED = (
    "README.md",
    "generation_config.json",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "pyproject.toml",
    "conf",
    "docs",
    "sglang_gen",
    "sweeps",
    "tests",
    "tools",
)
# A scale of 2: the rounding of these random weights grows with the scale.
SMALL = [
    "--height", "32", "--width", "48", "--num-inference-steps", "2", "--guidance-scale", "2", "dtype=float32",
    "output.latents=true",
]  # fmt: skip

# Tiny weights: those of the reference in the page's test, and the other components of the tiny SD3 pipeline.
BUILD = """
import json, shutil, sys
from pathlib import Path
import test_tiny_dit as page, tiny
from safetensors.torch import save_file

folder, other = Path("tiny-dit"), tiny.sd3(Path("sd3"))
names = {"scheduler": "scheduler", "vae": "vae", "text_encoder": "text_encoder_3", "tokenizer": "tokenizer_3"}
index = json.loads((other / "model_index.json").read_text())
entries = {name: index[source] for name, source in names.items()} | {"transformer": ["diffusers", "TinyDiT"]}
for name, source in names.items():
    shutil.copytree(other / source, folder / name)
(folder / "transformer").mkdir()
config = {"_class_name": "TinyDiT", **page.EXAMPLES.tiny}
(folder / "transformer" / "config.json").write_text(json.dumps(config))
(folder / "model_index.json").write_text(json.dumps({"_class_name": "TinyDiTPipeline", **entries}))
weights = tiny.fill(page.Reference(config), 5).state_dict()
save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
"""
# Several commands in one process, which saves the imports of torch.
RUN = """
import json, sys
from sglang_gen.cli import main
sys.exit(next((code for words in json.loads(sys.argv[1]) if (code := main(words))), 0))
"""


def files(root: Path) -> dict[str, bytes]:
    """Contents of the copied folders' files by path, without bytecode."""
    found = [root / name for name in COPIED if (root / name).is_file()]
    found += [path for name in COPIED for path in (root / name).rglob("*") if path.is_file()]
    kept = [path for path in found if "__pycache__" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout with the page's files."""
    root = tmp_path_factory.mktemp("adding") / "checkout"
    for name, content in files(pages.ROOT).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for name, text in SOURCES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def python(checkout: Path, *words: str, folder: Path) -> str:
    """Run Python on the copy; gives its standard output."""
    paths = [checkout, checkout / "tests", checkout / "tests" / "lib"]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def weights(checkout, tmp_path_factory) -> Path:
    """A folder that holds the folder tiny-dit."""
    folder = tmp_path_factory.mktemp("weights")
    python(checkout, "-c", BUILD, folder=folder)
    return folder


@pytest.fixture(scope="module")
def run(checkout, weights):
    """Run commands of the page at a small size; each leaves its image in a folder named by its last word."""

    def run(commands: list[list[str]]) -> str:
        lines = [[*words, *SMALL, "--output-path", words[-1]] if len(words) > 1 else words for words in commands]
        return python(checkout, "-c", RUN, json.dumps(lines), folder=weights)

    return run


def chosen(*last: str) -> list[list[str]]:
    return [words for words in COMMANDS if words[-1] in last]


def test_the_page_adds_a_network_a_family_a_preset_and_a_test(checkout):
    before, after = files(pages.ROOT), files(checkout)
    assert {name for name, content in after.items() if before.get(name) != content} == set(SOURCES)
    assert before.keys() <= after.keys()
    family = [f"sglang_gen/families/tiny_dit/{name}.py" for name in ("__init__", "spec", "pipeline", "examples")]
    others = ["sglang_gen/models/tiny_dit.py", "conf/model/tiny_dit.yaml", "tests/test_tiny_dit.py"]
    assert set(SOURCES) == {*family, *others}
    assert not any("tiny_dit" in name or b"tiny_dit" in content for name, content in before.items() if name in CODE)


CODE = {name for name in files(pages.ROOT) if name.startswith(("sglang_gen/", "conf/", "tools/"))}


@pytest.mark.slow
def test_the_parity_test_of_the_page_passes(checkout):
    out = python(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_tiny_dit.py", folder=checkout)
    assert "6 passed" in out


@pytest.mark.slow  # 30 s: three processes that import torch
def test_the_model_is_listed_planned_and_run_on_one_process_and_on_two_ranks(run, weights, monkeypatch):
    out = run(chosen("models", "dry_run=true", "7", "parallel=tp2", "parallel=ring2"))
    assert "tiny_dit " in out
    assert "TinyDiTPipeline" in out
    monkeypatch.chdir(weights)
    assert not Path("dry_run=true").exists()
    assert min(picture("7/generated_image_0.png").std(axis=(0, 1))) > 5
    for ranks in ("parallel=tp2", "parallel=ring2"):
        assert np.array_equal(tensors(ranks)["noise"], tensors("7")["noise"])
        assert error(tensors(ranks)["latents"], tensors("7")["latents"]) <= 1e-5


@pytest.mark.slow  # compiles, and starts more ranks
def test_what_else_the_page_runs_gives_the_same_latents(run, weights, monkeypatch):
    others = [words for words in COMMANDS if words[-1].startswith(("parallel=", "attention=", "compile="))]
    run([*chosen("7"), *others])
    monkeypatch.chdir(weights)
    assert len(others) == 6
    errors = {words[-1]: error(tensors(words[-1])["latents"], tensors("7")["latents"]) for words in others}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.slow  # says again of the added family what these tests say of the others
def test_the_tests_that_the_page_names_pass_with_the_model(checkout):
    (line,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("pytest ")]
    out = python(checkout, "-m", *shlex.split(line), "-q", "-p", "no:cacheprovider", folder=checkout)
    assert "passed" in out
