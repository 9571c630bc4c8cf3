"""Requirements of the native engine: the components of a model, and the supported settings of its network configs.

Configs are checked key by key; a config with an unknown key is not supported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_gen.types import ModelCard

Accepts = Callable[[Any], bool]


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


@dataclass(frozen=True)
class Needs:
    """Requirements of one pipeline: legal classes of its components, and legal settings of its denoising network."""

    components: Mapping[str, tuple[str, ...]]
    network: str
    settings: Mapping[str, Accepts]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # all required if the model has the first

    def required(self, card: ModelCard) -> dict[str, tuple[str, ...]]:
        """The components that this model must have, with their legal classes."""
        more = self.optional if any(name in card.components for name in [*self.optional][:1]) else {}
        return {**self.components, **more}


def unsupported(needs: Needs, card: ModelCard) -> str | None:
    """A clause that says why the native engine cannot run this model; None if it can."""
    checker = "safety_checker" in card.components
    for name, classes in needs.required(card).items():
        if name not in card.components:
            return f"this model has no {name}"
        class_name = card.components[name].class_name
        if classes and class_name not in classes:
            return f"the {name} is a {class_name}, not a {' or '.join(classes)}"
    if checker and "safety_checker" not in needs.optional:
        return "it does not support a safety checker in this pipeline, and this model has one"
    if card.components["text_encoder"].config.get("use_attention_mask"):
        return "it does not support a text encoder that masks the padding of prompts (use_attention_mask)"
    for name, settings in ((needs.network, needs.settings), ("vae", AUTOENCODER)):
        for key, value in card.components[name].config.items():
            if not (key.startswith("_") or settings.get(key, ABSENT)(value)):
                return f"its {name} does not support {key}={value}"
    return None


AUTOENCODER: Mapping[str, Accepts] = {
    "in_channels": number, "out_channels": number, "latent_channels": number, "block_out_channels": numbers,
    "layers_per_block": number, "norm_num_groups": number, "down_block_types": one_of("DownEncoderBlock2D"),
    "up_block_types": one_of("UpDecoderBlock2D"), "act_fn": one_of("silu", "swish"),
    "mid_block_add_attention": one_of(True, False), "use_quant_conv": one_of(True, False),
    "use_post_quant_conv": one_of(True, False), "force_upcast": one_of(True, False), "scaling_factor": number,
    "shift_factor": number_or_none, "latents_mean": per_channel, "latents_std": per_channel,
    "sample_size": anything,  # size of its training images
}  # fmt: skip

CLIP, CLIP_PROJECTED, T5 = ("CLIPTextModel",), ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
VAE = ("AutoencoderKL",)
ANY: tuple[str, ...] = ()

SD3 = Needs(
    {
        "transformer": ("SD3Transformer2DModel",), "vae": VAE, "scheduler": ANY,
        "text_encoder": CLIP_PROJECTED, "text_encoder_2": CLIP_PROJECTED, "tokenizer": ANY, "tokenizer_2": ANY,
    },
    "transformer",
    {
        "sample_size": number, "patch_size": number, "in_channels": number, "out_channels": anything,
        "num_layers": number, "num_attention_heads": number, "attention_head_dim": number,
        "joint_attention_dim": number, "caption_projection_dim": number, "pooled_projection_dim": number,
        "pos_embed_max_size": number, "dual_attention_layers": anything, "qk_norm": one_of(None, "rms_norm"),
    },
    optional={"text_encoder_3": T5, "tokenizer_3": ANY},
)  # fmt: skip

FLUX = Needs(
    {
        "transformer": ("FluxTransformer2DModel",), "vae": VAE, "scheduler": ANY,
        "text_encoder": CLIP, "text_encoder_2": T5, "tokenizer": ANY, "tokenizer_2": ANY,
    },
    "transformer",
    {
        "patch_size": one_of(1), "in_channels": number, "out_channels": anything, "num_layers": number,
        "num_single_layers": number, "num_attention_heads": number, "attention_head_dim": number,
        "joint_attention_dim": number, "pooled_projection_dim": number, "guidance_embeds": anything,
        "axes_dims_rope": anything,
    },
)  # fmt: skip

UNET: Mapping[str, Accepts] = {
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

SD = Needs(
    {"unet": ("UNet2DConditionModel",), "vae": VAE, "scheduler": ANY, "text_encoder": CLIP, "tokenizer": ANY},
    "unet",
    UNET,
    optional={"safety_checker": ("StableDiffusionSafetyChecker",), "feature_extractor": ("CLIPImageProcessor",)},
)

SDXL = Needs(
    {**SD.components, "text_encoder_2": CLIP_PROJECTED, "tokenizer_2": ANY},
    "unet",
    {
        **UNET,
        "addition_embed_type": one_of("text_time"),
        "addition_time_embed_dim": number,
        "projection_class_embeddings_input_dim": number,
    },
)

NEEDS = {"sd3": SD3, "flux": FLUX, "sdxl": SDXL, "sd": SD}


def for_each_level(value: Any, levels: int) -> list[Any]:
    """A setting of a UNet's levels as a list: one value stands for all levels."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels


# diffusers' defaults for keys that are missing from the config of a UNet.
UNET_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "transformer_layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 1280, "norm_num_groups": 32,
    "norm_eps": 1e-5, "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
