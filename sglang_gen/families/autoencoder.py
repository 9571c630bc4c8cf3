"""Config and weight names of the autoencoder, which is the same network in every family."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from sglang_gen.models.vae import Autoencoder, Config, Scaling
from sglang_gen.weights.load import Rules, Sources, renamed

# Dotted parts of our tensor names -> the corresponding parts in a diffusers checkpoint.
NAMES: Rules = {
    "down": "down_blocks",
    "middle": "mid_block",
    "up": "up_blocks",
    "residuals": "resnets",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "norm_1": "norm1",
    "norm_2": "norm2",
    "conv_1": "conv1",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "attention.norm": "attentions.0.group_norm",
    "attention.to_qkv": {"q": "attentions.0.to_q", "k": "attentions.0.to_k", "v": "attentions.0.to_v"},
    "attention.to_out": "attentions.0.to_out.0",
    "norm_out": "conv_norm_out",
}
# Attention weights in checkpoints saved before diffusers 0.15, such as Stable Diffusion 1.5.
OLD_NAMES: Rules = {
    **NAMES,
    "attention.to_qkv": {"q": "attentions.0.query", "k": "attentions.0.key", "v": "attentions.0.value"},
    "attention.to_out": "attentions.0.proj_attn",
}

# diffusers' defaults for keys that a config leaves out, as old configs do.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (64,), "layers_per_block": 1,
    "norm_num_groups": 32, "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
    "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None, "force_upcast": True,
}  # fmt: skip


def sources(name: str) -> dict[str, str]:
    """Names of the checkpoint tensors of our tensor `name`, each with its section of the layer."""
    return renamed(name, NAMES)


def old_sources(name: str) -> dict[str, str]:
    """Like `sources`, for a checkpoint with the attention names of diffusers before 0.15."""
    return renamed(name, OLD_NAMES)


def sources_in(names: Collection[str]) -> Sources:
    """`old_sources` or `sources`, depending on the tensor names of a checkpoint."""
    return old_sources if any(name.endswith(".attentions.0.query.weight") for name in names) else sources


def config(diffusers_config: Mapping[str, Any]) -> Config:
    c = {**DEFAULTS, **diffusers_config}
    mean, deviation = c["latents_mean"], c["latents_std"]
    return Config(
        channels_in=c["in_channels"], channels_out=c["out_channels"], channels=c["latent_channels"],
        widths=tuple(c["block_out_channels"]), blocks=c["layers_per_block"], groups=c["norm_num_groups"],
        attention=c["mid_block_add_attention"], quant_conv=c["use_quant_conv"],
        post_quant_conv=c["use_post_quant_conv"], upcast=c["force_upcast"],
        scaling=Scaling(
            factor=c["scaling_factor"], shift=c["shift_factor"] or 0.0,
            mean=None if mean is None else tuple(mean), deviation=None if deviation is None else tuple(deviation),
        ),
    )  # fmt: skip


def build(diffusers_config: Mapping[str, Any]) -> nn.Module:
    return Autoencoder(config(diffusers_config))


def dtype(vae: Autoencoder) -> torch.dtype:
    return next(vae.parameters()).dtype
