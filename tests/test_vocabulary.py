"""A tokenizer whose token ids leave the embedding table of its text encoder is refused by name."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from sglang_gen.hub.vocabulary import check_tokenizers
from sglang_gen.types import Component

BACKENDS = pytest.mark.parametrize("backend", ["sglang", "diffusers"])


@BACKENDS
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("name", "which"), [("sd15", ""), ("sd3", "_3"), ("flux", "_2")])
def test_a_tokenizer_larger_than_its_text_encoder_is_refused(pipelines, sglang, tmp_path, backend, dry, name, which):
    folder = tmp_path / "model"
    shutil.copytree(pipelines[name], folder)
    config = folder / f"text_encoder{which}" / "config.json"
    content = json.loads(config.read_text())
    rows = content["vocab_size"]
    config.write_text(json.dumps({**content, "vocab_size": rows - 3}))
    weights = config.parent / "model.safetensors"
    shorter = {key: tensor[:-3] if len(tensor) == rows else tensor for key, tensor in load_file(weights).items()}
    save_file({key: tensor.contiguous() for key, tensor in shorter.items()}, weights, {"format": "pt"})
    words = ("dry_run=true",) if dry else ()
    done = sglang("generate", "--model-path", folder, "--prompt", "a", "--backend", backend, *words)
    assert done.code == 2
    assert done.lines[-1] == (
        f"ERROR: {folder}/tokenizer{which} has token ids up to {rows - 1}, and the text_encoder{which} embeds ids "
        f"below {rows - 3} (vocab_size): the tokenizer belongs to another text encoder"
    )


@pytest.mark.parametrize(("files", "last"), [
    ({"vocab.json": {"a": 0, "b": 7}}, 7),
    ({"vocab.json": {"a": 0}, "added_tokens.json": {"<x>": 9}}, 9),
    ({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}, "vocab.json": {"z": 99}}, 1),
    ({"tokenizer.json": {"model": {"vocab": {"a": 3}}, "added_tokens": [{"id": 12, "content": "<x>"}]}}, 12),
    ({"tokenizer.json": {"model": None, "added_tokens": 3}}, -1),
    ({"spiece.model": {}}, -1),
])  # fmt: skip
def test_ids_are_counted_in_every_format(tmp_path, files, last):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))

    def check(config):
        check_tokenizers({
            "tokenizer": Component("transformers", "CLIPTokenizer", tmp_path, {}),
            "text_encoder": Component("transformers", "CLIPTextModel", tmp_path, config),
        })  # fmt: skip

    check({"vocab_size": last + 1})
    check({"text_config": {"vocab_size": last + 1}})
    check({})
    if last >= 0:
        with pytest.raises(ValueError, match=f"token ids up to {last}, and the text_encoder embeds ids below {last} "):
            check({"vocab_size": last})
