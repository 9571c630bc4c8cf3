"""Bytes of the weights that one rank holds, and which of them stay in the mapped files on a CPU."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sglang_gen.backends.native.build import Built, has_channels_last
from sglang_gen.config.schema import Weights
from sglang_gen.dry_run.traces import ranks_of_encoder
from sglang_gen.errors import UserError
from sglang_gen.families import autoencoder, text_encoders
from sglang_gen.families.contract import Spec
from sglang_gen.families.encoder_sizes import COUNT
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.hub.safetensors_header import Tensor, read_header
from sglang_gen.models.vae import Autoencoder
from sglang_gen.types import Component, Plan
from sglang_gen.weights.load import Sources, slots

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtype -> safetensors' name


def weights_of(plan: Plan, spec: Spec, networks: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each component's weights on one rank; `networks` has those of the denoising networks."""
    size = getattr(torch, plan.dtype).itemsize
    sizes = {}
    for name in spec.required(plan.card):
        component = plan.card.components[name]
        if name in networks:
            sizes[name] = networks[name]
        elif component.class_name in COUNT:
            sizes[name] = COUNT[component.class_name](component.config, ranks_of_encoder(plan, name)) * size
            sizes[name] += text_encoders.bytes_kept_in_float32(component, plan.dtype)
    return sizes


def mapped_of(plan: Plan, spec: Spec, networks: Mapping[str, Built]) -> dict[str, int]:
    """Bytes of each component's weights that are not in anonymous memory; `networks` are those of the trace on meta.

    On a CPU a weight stays in the file that is mapped, whose pages the kernel can drop, if the file stores it in the
    run's dtype and nothing copies it: fused layers join several tensors, a rank copies its shard, and convolutions
    with channels last have another layout.
    """
    if plan.device != "cpu" or plan.run.model.weights is Weights.random or plan.card.file is not None:
        return {}
    sizes = {}
    for name in spec.required(plan.card):
        component = plan.card.components[name]
        stored = _stored(component, plan.dtype)
        if not stored:
            continue
        if name in networks:
            built = networks[name]
            sizes[name] = _views(built.network, built.pipeline.sources, stored, built.shards, has_channels_last(plan))
        elif component.class_name == "AutoencoderKL":
            with torch.device("meta"):
                vae = Autoencoder(autoencoder.config(component.config))
            sizes[name] = _views(vae, autoencoder.sources_in(stored), stored, {}, channels_last=False)
        elif component.class_name in COUNT:
            count = partial(COUNT[component.class_name], component.config)
            ranks, whole = ranks_of_encoder(plan, name), count(1)
            replicated = whole if ranks == 1 else (ranks * count(ranks) - whole) // (ranks - 1)
            bytes_of_all = replicated * getattr(torch, plan.dtype).itemsize
            sizes[name] = min(bytes_of_all, sum(map(_size, stored.values())))
    return sizes


def _stored(component: Component, dtype: str) -> dict[str, Tensor]:
    """The tensors of a component's files that are stored in the run's dtype, by name."""
    if component.folder is None or component.file is not None or component.library not in ("diffusers", "transformers"):
        return {}
    if not any(component.folder.glob("*.safetensors")):
        return {}
    try:
        headers = [read_header(file).tensors for file in in_folder(component.folder)]
    except UserError:  # the files were moved or replaced after they had been read
        return {}
    return {
        name: tensor for tensors in headers for name, tensor in tensors.items() if tensor.dtype == STORED.get(dtype)
    }


def _views(
    network: nn.Module, sources: Sources, stored: Mapping[str, Tensor], shards: Mapping[str, Any], channels_last: bool
) -> int:
    """Bytes of the network's tensors that `load.stream` leaves views of the mapped files."""
    total = 0
    for slot in slots(network):
        names = [*sources(slot.name)]
        copied = len(names) > 1 or slot.name in shards or (channels_last and isinstance(slot.module, nn.Conv2d))
        if not copied and names[0] in stored:
            total += _size(stored[names[0]])
    return total


def _size(tensor: Tensor) -> int:
    return tensor.numbers * (4 if tensor.dtype == "F32" else 2)
