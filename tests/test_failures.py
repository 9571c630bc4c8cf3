"""Everything that can be wrong with a model or go wrong in a run: one sentence, its exit code, nothing half-written."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from sglang_gen.models.sd3 import SD3
from sglang_gen.models.vae import Autoencoder

SMALL = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7", "--dtype", "float32")


@pytest.fixture
def folder(pipelines, tmp_path) -> Path:
    """A copy of the SD3 pipeline that may be damaged."""
    return Path(shutil.copytree(pipelines["sd3"], tmp_path / "model"))


@pytest.fixture
def fails(sglang):
    """Run with a model that must fail: the ERROR line is the last, alone of its kind, and no file is left."""

    def run(path: object, code: int, *more: str) -> str:
        done = sglang("generate", "--model-path", path, "--prompt", "a", *SMALL, *more)
        assert done.code == code, done.err
        assert [line for line in done.lines if not line.startswith(("INFO: ", "WARNING: "))] == done.lines[-1:]
        assert done.out == ""
        left = [file.name for file in Path("outputs").glob("*")] if Path("outputs").exists() else []
        assert left == []
        return done.lines[-1]

    return run


def edit(path: Path, name: str, value: object) -> None:
    content = json.loads(path.read_text())
    content[name] = value
    path.write_text(json.dumps(content))


def spoil(path: Path, name: str, tensor: torch.Tensor | None = None) -> None:
    """Put another tensor, or NaN, in place of one in a weight file."""
    tensors = load_file(path)
    tensors[name] = torch.full_like(tensors[name], torch.nan) if tensor is None else tensor
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.whole
def test_a_missing_folder(fails):
    for path in ("/nowhere/model", "./model", "nowhere"):
        assert fails(path, 2) == f"ERROR: The model folder {path} does not exist"
    for name, preset in (("sdxl", "sdxl"), ("Landscape", "landscape"), ("FLUX.1-dev", "flux_dev")):
        expected = f"ERROR: The model folder {name} does not exist; did you mean the preset model={preset}?"
        assert fails(name, 2) == expected
    assert fails("x" * 300, 2).startswith("ERROR: model.path is too long to name anything: ")


def test_a_file_in_place_of_a_folder(fails):
    Path("model.safetensors").write_bytes(b"x")
    assert fails("model.safetensors", 2).startswith("ERROR: The weight file model.safetensors is corrupt: ")


def test_a_folder_without_model_index(fails, tmp_path):
    assert fails(tmp_path, 2) == f"ERROR: {tmp_path} is not a diffusers model: it has no model_index.json"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "cannot be read: it is not valid JSON in line 1"),
        (b"\xff\xfe", "cannot be read: "),
        (b"[1]", "does not hold a JSON object"),
        (b"{}", "names no pipeline class or no components"),
        (b'{"_class_name": 3, "vae": ["diffusers", "AutoencoderKL"]}', "names no pipeline class or no components"),
        (b'{"_class_name": [], "vae": ["diffusers", "AutoencoderKL"]}', "names no pipeline class or no components"),
    ],
)
def test_a_broken_model_index(fails, folder, content, sentence):
    (folder / "model_index.json").write_bytes(content)
    assert fails(folder, 2).startswith(f"ERROR: {folder}/model_index.json {sentence}")


def test_a_pipeline_class_that_diffusers_lacks(fails, folder):
    edit(folder / "model_index.json", "_class_name", "StableDifusion3Pipeline")
    assert "did you mean 'StableDiffusion3Pipeline'?" in fails(folder, 2)


def test_a_broken_component_config(fails, folder):
    (folder / "vae" / "config.json").write_text("{")
    assert fails(folder, 2).startswith(f"ERROR: {folder}/vae/config.json cannot be read: ")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer_3", "scheduler"])
def test_a_missing_component_folder(fails, folder, part):
    shutil.rmtree(folder / part)
    for words in ((), ("dry_run=true",)):
        assert fails(folder, 2, *words) == f"ERROR: {folder} lacks the folder '{part}' that its model_index.json names"


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_missing_weight_file(fails, folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    file.unlink()
    assert fails(folder, 2) == f"ERROR: {folder}/{part} holds no weights (*.safetensors)"


def test_a_missing_shard(fails, folder):
    part = folder / "transformer"
    model = diffusers.SD3Transformer2DModel.from_pretrained(part)
    next(part.glob("*.safetensors")).unlink()
    model.save_pretrained(part, max_shard_size="50KB")
    shards = sorted(part.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert fails(folder, 2) == f"ERROR: {part} lacks the weight file {shards[1].name}"


def test_a_tokenizer_without_vocabulary(fails, folder):
    (folder / "tokenizer_3" / "tokenizer.json").unlink()
    assert fails(folder, 2) == f"ERROR: {folder}/tokenizer_3 holds no vocabulary for T5Tokenizer"


def test_a_git_lfs_pointer(fails, folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert fails(folder, 2) == f"ERROR: The weight file {file} is a Git LFS pointer: run 'git lfs pull'"


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_corrupt_weight_file(fails, folder, part, damage):
    (file,) = (folder / part).glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"\x07" * 4096, "empty": b""}[damage])
    assert fails(folder, 2).startswith(f"ERROR: The weight file {file} is corrupt: ")


def test_weights_of_another_shape(fails, folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    name = "transformer_blocks.0.attn.to_q.weight"
    spoil(file, name, torch.zeros(3, 5))
    sentence = fails(folder, 2, "--backend", "diffusers")
    assert f"{name} has the shape [3, 5] in place of [" in sentence
    sentence = fails(folder, 2, "--backend", "sglang")
    assert f"{name} has the shape [3, 5], this network needs [..., 32]" in sentence


def test_a_component_of_a_class_that_does_not_exist(fails, folder):
    edit(folder / "model_index.json", "transformer", ["diffusers", "NoSuchTransformer"])
    assert "has a component of the class NoSuchTransformer, which the installed diffusers does not" in fails(folder, 2)


def test_a_component_of_a_library_that_is_not_installed(fails, folder):
    edit(folder / "model_index.json", "transformer", ["no_such_library", "Transformer"])
    assert "runs code from its repository (transformer/no_such_library.py)" in fails(folder, 2)


def test_nan_in_the_network_saves_no_black_picture(fails, folder):
    spoil(folder / "transformer" / "diffusion_pytorch_model.safetensors", "proj_out.bias")
    assert fails(folder, 1) == (
        "ERROR: There are NaN or infinite values in the latents of sample 0 (seed 7), so the result would be black or "
        "silent; try --dtype float32 (or bfloat16 in place of float16)"
    )


def test_nan_in_the_decoder_saves_no_black_picture(fails, folder):
    spoil(folder / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias")
    assert re.match(
        r"ERROR: There are NaN or infinite values in the decoded image of sample 0 \(seed 7\)", fails(folder, 1)
    )


NETWORKS = {"sglang": SD3, "diffusers": diffusers.SD3Transformer2DModel}
DECODERS = {"sglang": Autoencoder, "diffusers": diffusers.AutoencoderKL}
BACKENDS = pytest.mark.parametrize("backend", NETWORKS)


@BACKENDS
@pytest.mark.parametrize("decodes", [False, True])
def test_running_out_of_memory(fails, pipelines, monkeypatch, backend, decodes):
    def full(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    if decodes:
        monkeypatch.setattr(DECODERS[backend], "decode", full)
    else:
        monkeypatch.setattr(NETWORKS[backend], "forward", full)
    assert fails(pipelines["sd3"], 1, "--backend", backend).startswith("ERROR: Out of memory while ")


@BACKENDS
def test_running_out_of_host_memory(fails, pipelines, monkeypatch, backend):
    def full(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                           "you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip

    monkeypatch.setattr(NETWORKS[backend], "forward", full)
    assert fails(pipelines["sd3"], 1, "--backend", backend).startswith("ERROR: Out of memory while ")


@pytest.mark.parametrize(
    ("backend", "owner"), [("sglang", T5EncoderModel), ("diffusers", diffusers.StableDiffusion3Pipeline)]
)
def test_running_out_of_memory_while_loading(fails, pipelines, monkeypatch, backend, owner):
    def full(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(owner, "to", full)
    assert fails(pipelines["sd3"], 1, "--backend", backend) == f"ERROR: Out of memory while loading {pipelines['sd3']}"


@pytest.mark.whole
@BACKENDS
@pytest.mark.parametrize("kind", [RuntimeError, AttributeError])
def test_a_defect_is_one_sentence_and_a_traceback_on_request(fails, sglang, pipelines, monkeypatch, kind, backend):
    def broken(*_args: object, **_kwargs: object) -> None:
        raise kind("the pipe burst\nin two places")

    monkeypatch.setattr(NETWORKS[backend], "forward", broken)
    words = ("--backend", backend)
    sentence = fails(pipelines["sd3"], 1, *words)
    assert re.fullmatch(r"ERROR: An unexpected error in \S+, line \d+, ended the run \(--log-level .*\)", sentence)
    shown = sglang(
        "generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, "--log-level", "debug", *words
    )
    assert shown.code == 1
    assert "Traceback (most recent call last):" in shown.err
    assert "in two places" in shown.err
    assert shown.lines[-1] == sentence


@pytest.mark.whole
def test_a_refusal_of_the_pipeline_is_the_users(fails, pipelines):
    words = ("sampling.max_sequence_length=9999", "--backend")
    refusal = "ERROR: sampling.max_sequence_length is 9999; StableDiffusion3Pipeline takes at most 512"
    assert fails(pipelines["sd3"], 2, *words, "diffusers") == refusal
    assert fails(pipelines["sd3"], 2, *words, "sglang") == refusal


@BACKENDS
def test_what_was_finished_before_a_failure_stays_whole(sglang, pipelines, monkeypatch, backend):
    calls = []
    forward = NETWORKS[backend].forward

    def second_breaks(self, *args, **kwargs):
        latents = args[0] if args else kwargs["hidden_states"]
        if latents.device.type == "meta":  # shapes are found out, and nothing is computed
            return forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("lost")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(NETWORKS[backend], "forward", second_breaks)
    words = ("--num-samples", "2", "--backend", backend)
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", *SMALL, *words)
    assert done.code == 1
    assert sorted(file.name for file in Path("outputs").iterdir()) == [
        "generated_image_0.json",
        "generated_image_0.png",
    ]
