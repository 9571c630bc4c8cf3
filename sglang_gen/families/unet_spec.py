"""Facts about the UNet families: accepted settings, diffusers' defaults, limits of parallelism. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from sglang_gen.families.accepted import anything, number, one_of, per_level
from sglang_gen.families.contract import Accepts, ComponentConfig, head_counts
from sglang_gen.types import Size

SETTINGS: Mapping[str, Accepts] = {
    "sample_size": anything, "in_channels": number, "out_channels": number, "block_out_channels": per_level,
    "layers_per_block": per_level, "transformer_layers_per_block": per_level, "attention_head_dim": per_level,
    "cross_attention_dim": number, "norm_num_groups": number, "norm_eps": number,
    "down_block_types": one_of("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": one_of("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": one_of("UNetMidBlock2DCrossAttn"),
    "act_fn": one_of("silu", "swish"), "flip_sin_to_cos": one_of(True), "downsample_padding": one_of(1),
    "mid_block_scale_factor": one_of(1), "resnet_out_scale_factor": one_of(1),
    "resnet_time_scale_shift": one_of("default"), "time_embedding_type": one_of("positional"),
    "conv_in_kernel": one_of(3), "conv_out_kernel": one_of(3), "attention_type": one_of("default"),
    "only_cross_attention": one_of(False), "freq_shift": one_of(0),
    # Not used by the settings accepted above, or without effect: fused attention needs no upcast, dropout is off.
    "addition_embed_type_num_heads": anything, "use_linear_projection": anything, "upcast_attention": anything,
    "dropout": anything, "projection_class_embeddings_input_dim": anything, "addition_time_embed_dim": anything,
}  # fmt: skip

# diffusers' defaults for keys that are missing from the config of a UNet.
UNET_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "transformer_layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 1280, "norm_num_groups": 32,
    "norm_eps": 1e-5, "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip

SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")  # sample every UNet in any number of steps


def for_each_level(value: Any, levels: int) -> list[Any]:
    """A setting of a UNet's levels as a list: one value stands for all levels."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


def skip_connections(config: ComponentConfig) -> int:
    """Number of skip connections: one for the first convolution, each residual block and each downsampling."""
    c = {**UNET_DEFAULTS, **config}
    levels = len(c["block_out_channels"])
    return sum(for_each_level(c["layers_per_block"], levels)) + levels


def heads(config: ComponentConfig) -> tuple[int, ...]:
    """Distinct head counts of the middle block and of the levels with attention, smallest first.

    `attention_head_dim` of a UNet is its number of heads, a naming error that diffusers keeps for its checkpoints.
    """
    return head_counts({count for count, _ in _attention_levels(config)})


def head_widths(config: ComponentConfig) -> tuple[int, ...]:
    """Distinct numbers of channels of a head, smallest first: the channels of a level over its heads."""
    return head_counts({width // count for count, width in _attention_levels(config) if head_counts({count})})


def _attention_levels(config: ComponentConfig) -> list[tuple[int, int]]:
    """Heads and channels of the middle block and of the levels with attention."""
    c = {**UNET_DEFAULTS, **config}
    widths = c["block_out_channels"]
    counts = for_each_level(c.get("num_attention_heads") or c["attention_head_dim"], len(widths))
    levels = [*zip(counts, widths, c["down_block_types"], strict=False), (counts[-1], widths[-1], "CrossAttn")]
    levels += zip(reversed(counts), reversed(widths), c["up_block_types"], strict=False)
    return [(count, width) for count, width, kind in levels if "Attn" in kind]


def channels(config: ComponentConfig) -> tuple[tuple[int, str], ...]:
    """Sizes besides the heads that tensor parallelism divides: groups of the norms, channels of the residual blocks."""
    c = {**UNET_DEFAULTS, **config}
    widths = [(count, "residual blocks of {} channels") for count in sorted(set(c["block_out_channels"]))]
    return ((c["norm_num_groups"], "group norms of {} groups"), *widths)


def bands(config: ComponentConfig, size: Size, factor: int) -> tuple[int, str]:
    """Bands of the image that sequence parallelism distributes: one for each row of the coarsest level."""
    c = {**UNET_DEFAULTS, **config}
    band = factor * 2 ** (len(c["block_out_channels"]) - 1)  # rows of pixels
    return size.height // band, f"bands of {band} rows of pixels"
