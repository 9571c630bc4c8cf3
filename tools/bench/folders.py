"""Writes a preset's model with random weights in bfloat16 as a folder, from the configs in the package.

The weights are those of model.weights=random. They are drawn one component at a time, so that the given device holds at
most the largest component and the host one shard of it. Tokenizers are the embedded model's with the maximum length of
the preset's text encoder, to which texts are padded.
"""

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from sglang_gen import env
from sglang_gen.backends import random_components
from sglang_gen.types import DENOISERS, Component

SHARD = "4GB"
Configs = Mapping[str, Mapping[str, Any]]  # component name -> config


def configs(preset: str, changes: Configs | None = None) -> Configs:
    """The configs of a preset's components, with `changes` applied."""
    originals = {path.parent.name: json.loads(path.read_text()) for path in env.preset_configs(preset).glob("*/*.json")}
    return {name: config | (changes or {}).get(name, {}) for name, config in originals.items()}


def write(
    preset: str, folder: Path, device: str, changes: Configs | None = None, check: Callable[[Any], None] | None = None
) -> Path:
    """Write the model to `folder` unless it is complete already. `check` is called with the denoising network."""
    index = json.loads((env.preset_configs(preset) / "model_index.json").read_text())
    component_configs, tokenizers = configs(preset, changes), _embedded_tokenizers()
    if (folder / "model_index.json").exists():  # written last
        return folder
    transformers.utils.logging.disable_progress_bar()
    for name, entry in index.items():
        if not isinstance(entry, list):
            continue
        library, kind = entry
        if kind.removesuffix("Fast") in tokenizers:
            encoder = component_configs[name.replace("tokenizer", "text_encoder")]
            _write_tokenizer(
                tokenizers[kind.removesuffix("Fast")], folder / name, encoder.get("max_position_embeddings", 512)
            )
        elif name == "scheduler":
            _write_json(folder / name / "scheduler_config.json", component_configs[name])
        else:
            described = Component(library, kind, None, component_configs[name])
            component: Any = random_components.network(name, described, torch.bfloat16, device)
            if check is not None and name in DENOISERS:
                check(component)
            component.save_pretrained(folder / name, max_shard_size=SHARD)
            del component
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    _write_json(folder / "model_index.json", index)
    return folder


def _embedded_tokenizers() -> dict[str, str]:
    """The embedded model's tokenizers by class, without the suffix of the fast variant."""
    index = json.loads((env.embedded_model() / "model_index.json").read_text())
    return {entry[1].removesuffix("Fast"): name for name, entry in reversed(index.items()) if "tokenizer" in name}


def _write_tokenizer(name: str, folder: Path, length: int) -> None:
    shutil.copytree(env.embedded_model() / name, folder, dirs_exist_ok=True)
    path = folder / "tokenizer_config.json"
    _write_json(path, json.loads(path.read_text()) | {"model_max_length": length})


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
