"""Converts FLUX checkpoints from the authors' layout to diffusers' tensor names.

diffusers' own conversion splits fused projections only at the published width, and copies them. These are views.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sglang_gen.hub.single_file import INSIDE

# The authors' modules -> diffusers' modules; several are concatenated along dimension 0 in the authors' tensor.
OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: Mapping[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
LAST = {"weight": "weight", "bias": "bias", "scale": "weight"}
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names, from those of the network or of a whole model; see `convert_network`."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(INSIDE)} or tensors
    return convert_network({name.removeprefix(INSIDE): tensor for name, tensor in inside.items()}, width)


def convert_network(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The tensors under diffusers' names; an unknown tensor keeps its name. `width` is the width of the network."""
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        targets = _targets(name)
        if name.startswith("final_layer.adaLN_modulation."):
            tensor = tensor.roll(len(tensor) // 2, 0)  # (shift, scale) in the original, (scale, shift) in diffusers
        splits = [width * number for number in range(1, len(targets))]
        converted |= zip(targets, tensor.tensor_split(splits) if splits else [tensor], strict=True)
    return converted


def _targets(name: str) -> list[str]:
    """diffusers' names of the parts of an original tensor, in order; the name itself if it is unknown."""
    module, _, last = name.rpartition(".")
    kind, _, inside = module.partition(".")
    prefix, rules = "", OUTSIDE
    if kind in BLOCKS:
        number, _, module = inside.partition(".")
        prefix, rules = f"{BLOCKS[kind][0]}.{number}.", BLOCKS[kind][1]
    if module not in rules or last not in LAST:
        return [name]
    return [f"{prefix}{part}.{LAST[last]}" for part in rules[module]]
