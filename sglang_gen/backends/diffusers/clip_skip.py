"""Checks `clip_skip` of --diffusers-kwargs: the number of last layers of the text encoder that a prompt skips."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from sglang_gen.backends.diffusers.pipeline_signature import Kind
from sglang_gen.errors import UserError
from sglang_gen.hub import component_classes
from sglang_gen.types import Component, Plan

ARGUMENT, ENCODER, INNER = "clip_skip", "text_encoder", "text_model"


def check_clip_skip(plan: Plan, kind: Kind, call: Mapping[str, Any]) -> None:
    """Refuse a number of layers that the text encoder does not have. Raises UserError.

    Also where the pipeline reads `text_encoder.text_model`, which newer versions of transformers do not have.
    """
    value, encoder = call.get(ARGUMENT), plan.card.components.get(ENCODER)
    if value is None or encoder is None:
        return
    layers = encoder.config.get("num_hidden_layers")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (layers is not None and value >= layers):
        most = f", and this text encoder has {layers}" if layers is not None else ""
        raise UserError(f"--diffusers-kwargs: '{ARGUMENT}' is {value!r}; it is a number of layers to skip{most}")
    encode = getattr(kind.pipeline_class, "encode_prompt", None)
    if encode is not None and f".{INNER}." in inspect.getsource(encode) and not _has_inner_model(encoder):
        raise UserError(
            f"--diffusers-kwargs: '{ARGUMENT}' does not work with {kind.pipeline_class.__name__} of this diffusers and "
            f"transformers {transformers.__version__}, whose {encoder.class_name} has no {INNER}; leave it out"
        )


def _has_inner_model(encoder: Component) -> bool:
    encoder_class = component_classes.named(encoder)
    with torch.device("meta"):
        return hasattr(encoder_class(encoder_class.config_class.from_dict(dict(encoder.config))), INNER)
