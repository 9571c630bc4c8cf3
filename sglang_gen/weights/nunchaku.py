"""Loads SVDQuant files into the nunchaku project's networks, on the GPUs that its kernels support.

This code has never run, because no such GPU was available. The checks that need no GPU are in `plan.quantization` and
are tested.
"""

import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from sglang_gen.errors import UserError, in_our_words
from sglang_gen.families.nunchaku_classes import NUNCHAKU_CLASSES
from sglang_gen.hub.weight_files import FLAG, WeightFiles
from sglang_gen.plan import quantization
from sglang_gen.types import Plan

NUNCHAKU_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError, AssertionError)


def load(plan: Plan, class_name: str, files: WeightFiles, metadata: Mapping[str, str], dtype: torch.dtype) -> Any:
    """nunchaku's network that replaces diffusers' `class_name`. Raises UserError if machine or file do not allow it."""
    if plan.run.lora.path or plan.run.lora.adapters:
        raise UserError(f"lora: {files.given} is quantized by svdquant, and {quantization.NO_MERGE}")
    if plan.run.quant.method in quantization.ON_LOAD:
        raise UserError(f"quant={plan.run.quant.method.name}: {files.given} is quantized already, by svdquant")
    precision = check_file(files.given, metadata, plan.run.quant.nunchaku_config)
    if sentence := quantization.refuse_nunchaku(quantization.facts_of(plan.device), precision):
        raise UserError(sentence)
    if class_name not in NUNCHAKU_CLASSES:
        raise UserError(f"nunchaku has no network for {class_name}; it has {', '.join(sorted(NUNCHAKU_CLASSES))}")
    if len(files.paths) > 1:
        raise UserError(
            f"{FLAG}: {files.given} is in the older format with several files; give one svdq-*.safetensors file"
        )
    try:
        kind = getattr(importlib.import_module("nunchaku"), NUNCHAKU_CLASSES[class_name])
        network = kind.from_pretrained(str(files.paths[0]), torch_dtype=dtype, device=plan.device)
        if implementation := plan.run.quant.nunchaku_config.get("attention"):
            network.set_attention_impl(implementation)
    except NUNCHAKU_ERRORS as error:
        raise UserError(f"nunchaku cannot load {files.given}: {in_our_words(error)}") from error
    return network


def check_file(given: str, metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The precision of an SVDQuant file according to its metadata, which --nunchaku-config must not contradict.

    Raises UserError for a file of another kind, and for a config that contradicts the file.
    """
    try:
        declared = json.loads(metadata.get("quantization_config", "null"))
    except ValueError:
        declared = None
    if not isinstance(declared, dict) or declared.get("method") != "svdquant":
        raise UserError(f"{FLAG}: {given} is not an SVDQuant file: its metadata declares no quantization by svdquant")
    weight = declared.get("weight")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    facts = {"precision": "int4" if dtype == "int4" else "nvfp4", "rank": declared.get("rank")}
    for key in ("precision", "rank"):
        if key in config and config[key] != facts[key]:
            raise UserError(f"--nunchaku-config: '{key}' is {config[key]} and {given} has {facts[key]}")
    return str(facts["precision"])
