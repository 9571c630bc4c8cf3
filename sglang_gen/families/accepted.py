"""What the native engine accepts in the configs of components: predicates, and facts that several families share.

Configs are checked key by key; a config with an unknown key is not supported.
"""

from collections.abc import Mapping
from typing import Any

from sglang_gen.families.contract import Accepts


def anything(value: Any) -> bool:
    return True


def number(value: Any) -> bool:
    return isinstance(value, (int, float))


def per_level(value: Any) -> bool:
    """A number for all levels, or a list with a number for each level."""
    return all(number(item) for item in value) if isinstance(value, (list, tuple)) else number(value)


def numbers(value: Any) -> bool:
    """A list of numbers."""
    return isinstance(value, (list, tuple)) and per_level(value)


def number_or_none(value: Any) -> bool:
    return value is None or number(value)


def per_channel(value: Any) -> bool:
    """A list with a number for each channel, or None."""
    return value is None or numbers(value)


def one_of(*values: Any) -> Accepts:
    """A predicate for one of `values`, or a list of them."""
    return lambda value: all(item in values for item in (value if isinstance(value, (list, tuple)) else [value]))


ABSENT = one_of(None, False)

AUTOENCODER: Mapping[str, Accepts] = {
    "in_channels": number, "out_channels": number, "latent_channels": number, "block_out_channels": numbers,
    "layers_per_block": number, "norm_num_groups": number, "down_block_types": one_of("DownEncoderBlock2D"),
    "up_block_types": one_of("UpDecoderBlock2D"), "act_fn": one_of("silu", "swish"),
    "mid_block_add_attention": one_of(True, False), "use_quant_conv": one_of(True, False),
    "use_post_quant_conv": one_of(True, False), "force_upcast": one_of(True, False), "scaling_factor": number,
    "shift_factor": number_or_none, "latents_mean": per_channel, "latents_std": per_channel,
    "sample_size": anything,  # size of its training images
}  # fmt: skip

# Accepted classes of components.
CLIP, CLIP_PROJECTED, T5 = ("CLIPTextModel",), ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
VAE = ("AutoencoderKL",)
ANY: tuple[str, ...] = ()
