"""What people have and do in their first hour: one sentence that says what to change, before anything is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native import edited, runner, with_scheduler
from PIL import Image
from safetensors.torch import save_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 3438167536\n"


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"num_inference_steps: [1\n", "is not valid YAML: expected ',' or ']'"),
        (b"sampling:\n\tseed: 1\n", "cannot start any token in line 2"),
        (b"prompt: a cat: in snow\n", "mapping values are not allowed here in line 1"),
        (b"seed: 1\nseed: 2\n", "found duplicate key seed in line 2"),
        (b"# caf\xe9\nseed: 1\n", "is not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("place", ["sampling/mine.yaml", "experiment/mine.yaml"])
def test_a_broken_file_of_the_users_configuration_is_named_with_its_line(sglang, place, text, sentence):
    path = Path("my") / place
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    option = "sampling=mine" if place.startswith("sampling") else "experiment=mine"
    done = sglang("generate", "--config-dir", "my", option, "--prompt", "a", "dry_run=true")
    assert done.code == 2
    assert str(path.absolute()) in done.lines[-1]
    assert sentence in done.lines[-1]


COSINE = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True, "solver_order": 2}


@pytest.mark.parametrize("words", [(), ("dry_run=true",)])
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_scheduler_that_runs_off_its_tables_is_refused_before_a_weight_is_read(pipelines, run, backend, words):
    model = with_scheduler(pipelines["sd15"], "DPMSolverMultistepScheduler", **COSINE)
    done = run(model, "--backend", backend, *words, steps=20)
    assert done.code == 2
    assert "DPMSolverMultistepScheduler finds no noise level for one of its 20 steps" in done.lines[-1]
    assert "use_karras_sigmas True" in done.lines[-1]


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
@pytest.mark.parametrize(("name", "code"), [("flux", 0), ("sd3", 0), ("sdxl", 2)])
def test_both_backends_agree_on_the_least_strength(run, name, code, backend):
    """A twentieth of ten steps is rounded up by flow matching and down by UNets."""
    Image.radial_gradient("L").resize((48, 32)).convert("RGB").save("in.png")
    words = ("--image-path", "in.png", "--diffusers-kwargs", '{"strength": 0.05}', "dry_run=true")
    assert run(name, "--backend", backend, *words, steps=10).code == code


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("sdxl", 99, "'clip_skip' is 99; it is a number of layers to skip, and this text encoder has 2"),
        ("sdxl", -1, "'clip_skip' is -1; it is a number of layers to skip"),
        ("sdxl", True, "'clip_skip' is True; it is a number of layers to skip"),
        ("sd15", 1, "'clip_skip' does not work with StableDiffusionPipeline of this diffusers and transformers"),
    ],
)
def test_layers_to_skip_are_those_that_the_text_encoder_has(run, name, value, sentence):
    done = run(name, "--diffusers-kwargs", json.dumps({"clip_skip": value}), "dry_run=true")
    assert done.code == 2, done.err
    assert sentence in done.lines[-1]


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer/vocab.json", "scheduler/more.json"])
def test_a_file_that_git_lfs_did_not_fetch_is_named(pipelines, run, file):
    model = edited(pipelines["sd15"], "model", "model_index.json")
    (model / file).write_text(POINTER)
    done = run(model)
    assert done.code == 2
    assert f"{model / file} is a Git LFS pointer: run 'git lfs pull'" in done.lines[-1]


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_component_that_is_one_file_needs_its_folder(run, backend):
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, "unet.safetensors")
    words = ("--component-paths", '{"unet": "unet.safetensors"}', "dry_run=true")
    done = run("sdxl", "--backend", backend, *words)
    assert done.code == 2
    assert "'unet' is the file unet.safetensors; it takes a folder with the weights and config.json" in done.lines[-1]


def test_an_adapter_with_a_part_for_another_text_encoder_says_which_part(run):
    weights = {}
    for module, (rows, columns) in {
        "lora_unet_double_blocks_0_img_attn_proj": (32, 32),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_k": (64, 64),
    }.items():
        weights[f"{module}.lora_down.weight"] = torch.ones(4, columns)
        weights[f"{module}.lora_up.weight"] = torch.ones(rows, 4)
        weights[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(weights, "both.safetensors")
    done = run("flux", "--lora-path", "both.safetensors")
    assert done.code == 2
    assert "both.safetensors also changes a text encoder, in modules such as lora_te3_" in done.lines[-1]
    assert "another model" not in done.lines[-1]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"block_out_channels": [0, 0]}, "block_out_channels is 0; it must be between 1 and 1000000"),
        ({"block_out_channels": "x"}, "block_out_channels is 'x'; it must be an integer or a list of integers"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000; it must be between 0 and 10000"),
        ({"in_channels": -4}, "in_channels is -4; it must be between 1 and 1000000"),
        ({"norm_num_groups": True}, "norm_num_groups is 'True'; it must be an integer"),
    ],
)
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_size_that_no_network_can_have_is_named(pipelines, run, backend, config, sentence):
    model = edited(pipelines["sd15"], "model", "unet/config.json", **config)
    done = run(model, "--backend", backend)
    assert done.code == 2
    assert f"{model / 'unet/config.json'}: {sentence}" in done.lines[-1]


def test_a_configuration_that_is_nested_too_deeply_is_named(pipelines, run):
    model = edited(pipelines["sd15"], "model", "model_index.json")
    (model / "unet/config.json").write_text("[" * 100_000)
    done = run(model)
    assert done.code == 2
    assert f"{model / 'unet/config.json'} cannot be read: it is nested too deeply" in done.lines[-1]


@pytest.mark.parametrize("value", ["false", "True", "0", "no"])
def test_a_value_behind_a_switch_points_to_its_other_form(sglang, value):
    done = sglang("generate", "--prompt", "a", "--dit-cpu-offload", value)
    assert done.code == 2
    assert f"and '{value}' follows it: write one of --dit-cpu-offload and --no-dit-cpu-offload" in done.lines[-1]


def test_a_rank_outside_of_its_world_is_refused_at_once(sglang, monkeypatch):
    place = {"RANK": 5, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    done = sglang("generate", "--prompt", "a")
    assert done.code == 2
    assert "RANK is 5 and WORLD_SIZE 2: ranks are numbered from 0 to WORLD_SIZE - 1" in done.lines[-1]


@pytest.mark.parametrize(("name", "other"), [("vae", "transformer"), ("text_encoder", "text_encoder_3")])
def test_a_component_of_another_kind_is_refused_in_the_plan(pipelines, run, name, other):
    path = str(pipelines["sd3"] / other)
    done = run("sd3", "--component-paths", json.dumps({name: path}), "dry_run=true")
    assert done.code == 2
    assert f"--component-paths: {path} holds " in done.lines[-1]
    assert f"and '{name}' has the class " in done.lines[-1]


def test_a_preset_of_another_family_is_a_warning(run):
    done = run("sdxl", "--model-id", "FLUX.1-dev", "dry_run=true")
    assert done.code == 0, done.err
    assert any("The preset 'flux_dev' is for models of the class FluxPipeline" in line for line in done.lines)
    assert not any("is for models" in line for line in run("sdxl", "--model-id", "sdxl", "dry_run=true").lines)


@pytest.mark.whole
def test_a_process_without_stdout_ends_as_any_other():
    command = f"{sys.executable} -m sglang_gen --version >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
