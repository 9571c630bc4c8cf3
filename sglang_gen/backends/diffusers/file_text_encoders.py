"""Text encoders of single files that diffusers does not recognise: those under names without `text_model`.

Some trainers write `cond_stage_model.transformer.embeddings...` in place of `cond_stage_model.transformer.text_model.
embeddings...` (NovelAI's first model did). Only the names differ.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from sglang_gen.families.text_encoders import UNDER_TEXT_MODEL
from sglang_gen.hub import component_classes, single_file
from sglang_gen.hub.safetensors_header import header
from sglang_gen.types import TEXT_ENCODERS, Component, Plan

LACKED_PART = "text_model."


def load(plan: Plan, dtype: torch.dtype, replaced: Collection[str]) -> dict[str, Any]:
    """The text encoders of the plan's file under such names, on the CPU, by component; their tensors were checked."""
    assert plan.card.file is not None
    encoders = {}
    for name in TEXT_ENCODERS:
        component = plan.card.components.get(name)
        if component is None or name in replaced or component.class_name not in UNDER_TEXT_MODEL:
            continue
        names = single_file.of_text_encoder(header(plan.card.file), name, component)
        if names and not any(f".{LACKED_PART}" in full for full in names.values()):
            encoders[name] = _load(plan.card.file, component, names, dtype)
    return encoders


def _load(file: Path, component: Component, names: dict[str, str], dtype: torch.dtype) -> Any:
    kind = component_classes.named(component)
    with init_empty_weights():
        encoder = kind(kind.config_class.from_pretrained(component.folder))
    with safe_open(file, framework="pt") as opened:
        weights = {
            key: opened.get_tensor(names[key.removeprefix(LACKED_PART)]).to(dtype)
            for key in encoder.state_dict()
            if key.removeprefix(LACKED_PART) in names
        }
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval()
