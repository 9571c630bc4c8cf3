"""Every command of README.md and docs/ runs, and leaves what it promises; one that is shown as refused is refused so.

Each page has a folder of its own with the files that its commands name. Models of a hub are tiny pipelines of the same
class here, at 32 x 32 pixels; the number of steps is lowered where a line says none.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pages
import pytest
import tiny
import torch
from finished import Finished
from PIL import Image

from sglang_gen.hub import download as hub_download

TINY = {"stable-diffusion-xl": "sdxl", "stable-diffusion-3": "sd3", "stable-diffusion": "sd15", "FLUX": "flux",
        "Wan": "wan"}  # fmt: skip  # part of a repository's name -> builder; the first that fits counts
MEDIA = {".png", ".mp4", ".wav"}
PRINTS = ("--help", "--cfg", "--version", "--info", "models")
FOLDERS = {"my-model": "sdxl", "models/mine": "sdxl"}  # model folders that pages name
ADAPTERS = ("path/to/anime-lora", "anime-lora", "a", "b")  # of SDXL


@pytest.fixture(scope="module")
def models(pipelines, tmp_path_factory) -> dict[str, Path]:
    return {**pipelines, "wan": tiny.wan(tmp_path_factory.mktemp("models") / "tiny-wan")}


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory) -> Path:
    """A LoRA for the tiny SDXL."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    folder, weights = tmp_path_factory.mktemp("adapter"), {}
    unet = UNet2DConditionModel.from_pretrained(models["sdxl"], subfolder="unet")
    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_k")):
            weights[f"{name}.lora_A.weight"] = torch.ones(2, module.in_features)
            weights[f"{name}.lora_B.weight"] = torch.ones(module.out_features, 2)
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    return folder


@pytest.fixture
def props(models, adapter, monkeypatch):
    """Put what the commands of a page name into the working directory, and stand in for the hub."""

    def download(_model: object, name: str, _weights: bool) -> Path:
        kind = next((kind for part, kind in TINY.items() if part in name), None)
        assert kind, f"no tiny pipeline stands for {name}: give tests/test_page_commands.py one"
        return models[kind]

    def prepare(page: Path) -> None:
        monkeypatch.setattr(hub_download, "fetch", download)
        Image.new("RGB", (32, 32), (200, 90, 30)).save("fox.png")
        Image.new("RGB", (32, 32), (255, 255, 255)).save("mask.png")
        shutil.copytree(pages.ROOT / "sweeps", "sweeps")
        for name, kind in FOLDERS.items():
            shutil.copytree(models[kind], name)
        for name in ADAPTERS:
            shutil.copytree(adapter, name, dirs_exist_ok=True)
        for name, text in {**shown_elsewhere(), **pages.files(page)}.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text, encoding="utf-8")

    return prepare


def shown_elsewhere() -> dict[str, str]:
    return pages.files(pages.ROOT / "docs" / "command.md")  # generation_config.json


def is_large(words: list[str]) -> bool:
    """True where the model is not the embedded one: the line names another, or its configuration file does."""
    text = " ".join(words)
    if "--config" in words:
        text += Path(words[words.index("--config") + 1]).read_text(encoding="utf-8").partition('"schema_version"')[0]
    return any(f"model{sign}" in text for sign in ("=", "-path", "_path", ": "))


def shrunk(words: list[str]) -> list[str]:
    """The words with few steps and, for other models than the embedded one, few pixels."""
    words, text = list(words), " ".join(words)
    pixels = "64" if "parallel=" in text else "32"  # a UNet's ranks need a band of 32 rows each
    if "-m" in words and "perf." not in text and "perf=" not in text:
        words.append("perf=light")
    if "sweeps" not in words and "steps=" not in text and "num-inference-steps" not in text:
        few = 10 if "cache" in text else 2 if is_large(words) else 4  # a step cache computes eight before it reuses
        words.append(f"sampling.num_inference_steps={few}")
    for name in ("height", "width") if is_large(words) else ():
        if f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = pixels
        elif f"sampling.{name}=" not in text:
            words.append(f"sampling.{name}={pixels}")
    return words


def everything() -> set[Path]:
    return {path for path in Path().rglob("*") if path.is_file()}


def torchrun(options: list[str]):
    """Runs the command line as torchrun does with these options, which end with the module."""

    def run(*words: str) -> Finished:
        settings = {**os.environ, "PYTHONPATH": str(pages.ROOT)}
        command = [sys.executable, "-m", "torch.distributed.run", *options, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


def run(sglang, command: pages.Command) -> None:
    """Run one command and hold it against what its page says."""
    sglang = torchrun(command.launcher) if command.launcher else sglang
    words, before = command.words, everything()
    repeats = "--config" in words and "generated_image" in words[words.index("--config") + 1]
    if command.kind == "refused":
        done = sglang(*words)
        assert done.code == 2, f"{command.line}\n{done.err}"
        assert command.sentence, f"{command.line}: the comment below names the sentence"
        assert command.sentence in done.lines[-1], command.line
        assert [line for line in done.lines if not line.startswith(("INFO: ", "WARNING: "))] == done.lines[-1:]
        assert not any(path.suffix in MEDIA for path in everything() - before)
    elif words[0] == "perf":
        assert sglang(*words).code in (0, 1, 3), command.line  # a verdict on times is not this test's
        options = [words[index + 1] for index, word in enumerate(words) if word in ("--json", "--markdown")]
        assert all(Path(name).stat().st_size for name in options)
    elif words[0] == "report":
        done = sglang(*words)
        assert done.code == 0, f"{command.line}\n{done.err}"
        output = Path(words[words.index("--output") + 1]) if "--output" in words else Path(words[1], "report.html")
        assert {output, output.with_name("grid.png")} <= everything()
    elif words[0] in PRINTS or any(word in PRINTS or word.startswith("dry_run=") for word in words):
        done = sglang(*words)
        assert (done.code, bool(done.out)) == (0, True), f"{command.line}\n{done.err}"
    elif words[:2] == ["tune", "cache"]:
        done = sglang(*words)
        assert (done.code, bool(done.out)) == (0, True), f"{command.line}\n{done.out}{done.err}"
        assert Path(words[words.index("--output") + 1]) in everything() - before
    elif words[0] == "tune":
        kept = [word for place, word in enumerate(words) if "--budget" not in (word, words[max(place - 1, 0)])]
        small = ["--budget", "60s", "--axes", "dtype", "--prompt", "a lake", "--width", "64", "--height", "64"]
        done = sglang(*shrunk(kept), *small)
        assert (done.code, bool(done.out)) == (0, True), f"{command.line}\n{done.out}{done.err}"
    elif words[0] == "debug":
        done = sglang(*shrunk(words))
        assert (done.code, bool(done.out)) == (0, True), f"{command.line}\n{done.out}{done.err}"
        assert everything() == before
    else:
        if is_large(words):  # the line as it stands is planned
            assert sglang(*words, "dry_run=true").code == 0, command.line
        done = sglang(*(words if repeats else shrunk(words)))
        assert done.code == 0, f"{command.line}\n{done.err}"
        check_promises(words, everything() - before)
        if repeats:
            first = Path(words[words.index("--config") + 1]).with_suffix(".png")
            (again,) = [path for path in everything() - before if path.suffix == ".png"]
            assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first)))


def check_promises(words: list[str], made: set[Path]) -> None:
    """The files that a generation with these words leaves are among `made`."""
    text, kinds = " ".join(words), [path.suffix for path in made]
    count = int(words[words.index("--num-samples") + 1]) if "--num-samples" in words else 1
    assert sum(kind in MEDIA for kind in kinds) >= count, text
    assert len([path for path in made if path.name.startswith("generated_") and path.suffix == ".json"]) >= count
    if "--perf-dump-path" in words:
        assert json.loads(Path(words[words.index("--perf-dump-path") + 1]).read_text())["total_duration_ms"] > 0
    for word, suffix in (("output.latents=true", ".safetensors"), ("output=latents", ".safetensors"),
                         ("tracking=csv", ".csv"), ("tracking=wandb", ".wandb")):  # fmt: skip
        assert suffix in kinds or word not in words, text
    if "-m" in words:
        assert {"table.csv", "table.md"} <= {path.name for path in made}
        notes = [json.loads(path.read_text()) for path in made if path.name == "job.json"]
        assert len(notes) > 1
        assert [note["error"] for note in notes] == [None] * len(notes)


# Pages whose commands take long together; the others are those that a newcomer meets first.
LONG = {"README", "attention", "backend", "cache", "command", "comparing", "configuration", "experiment", "lora",
        "machine", "model", "offload", "output", "parallel", "parity", "perf", "planned_cache", "quality", "quant",
        "report", "reporting_results", "sampling", "sweep", "sweeps", "tracking", "tune", "tutorial"}  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in LONG else page for page in pages.PAGES],
    ids=lambda page: page.stem,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_the_commands_of_a_page_do_what_it_says(sglang, props, page, request):
    if page.stem in ("report", "tutorial"):
        request.getfixturevalue("reports")
    props(page)
    for command in pages.commands(page):
        if command.kind not in ("slow", "added") and command.whole_sweep is None:
            run(sglang, command)


SLOW = [command for page in pages.PAGES for command in pages.commands(page) if command.kind == "slow"]


@pytest.mark.slow  # compilation, or processes that are started
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("command", SLOW, ids=lambda command: command.line)
def test_a_slow_command_does_what_its_page_says(sglang, props, command):
    props(command.page)
    run(sglang, command)
