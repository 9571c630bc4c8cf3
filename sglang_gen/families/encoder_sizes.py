"""Parameter counts of text encoders and autoencoders, computed from their configurations.

For the dry run, which does not import their libraries: that takes seconds. Imports no torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]
CLIP_VISION = {  # transformers' defaults
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224,
    "num_channels": 3,
}  # fmt: skip


def clip(config: Config, ranks: int = 1) -> int:
    """Parameters of a CLIP text encoder (Radford et al. 2021)."""
    width, inside = config["hidden_size"], config["intermediate_size"]
    attention = 4 * _linear(width, width)
    feed_forward = _linear(width, inside) + _linear(inside, width)
    layer = attention + feed_forward + 2 * _norm(width)
    words = (config["vocab_size"] + config["max_position_embeddings"]) * width
    return int(words + config["num_hidden_layers"] * layer + _norm(width))


def clip_projected(config: Config, ranks: int = 1) -> int:
    """Parameters of a CLIP text encoder with a projection of the pooled text."""
    return int(clip(config) + config["hidden_size"] * config["projection_dim"])


def safety_checker(config: Config, ranks: int = 1) -> int:
    """Parameters of Stable Diffusion 1's safety checker: a CLIP image encoder, a projection, 17 + 3 concepts."""
    vision, projected = config.get("vision_config") or {}, config.get("projection_dim", 512)
    vision = {**CLIP_VISION, **vision}
    width, inside, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    layer = 4 * _linear(width, width) + _linear(width, inside) + _linear(inside, width) + 2 * _norm(width)
    tokens = (vision["image_size"] // patch) ** 2 + 1
    embedding = (vision["num_channels"] * patch**2 + 1 + tokens) * width
    encoder = embedding + 2 * _norm(width) + vision["num_hidden_layers"] * layer
    return int(encoder + width * projected + (17 + 3) * (projected + 1))


def t5(config: Config, ranks: int = 1) -> int:
    """Parameters of a T5 encoder (Raffel et al. 2020) on one of `ranks` tensor parallel ranks."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    gated = config.get("is_gated_act", str(config.get("feed_forward_proj", "relu")).startswith("gated"))
    sharded = config["num_layers"] * (4 * width * inner + (3 if gated else 2) * width * config["d_ff"])
    sharded += config.get("relative_attention_num_buckets", 32) * config["num_heads"]
    replicated = config["vocab_size"] * width + (2 * config["num_layers"] + 1) * width
    return int(sharded // ranks + replicated)


def autoencoder(config: Config, ranks: int = 1) -> int:
    """Parameters of an AutoencoderKL (Rombach et al. 2022): encoder and decoder."""
    widths, blocks = config["block_out_channels"], config.get("layers_per_block", 1)
    latent, last = config.get("latent_channels", 4), widths[-1]
    attention = 4 * _linear(last, last) + _norm(last) if config.get("mid_block_add_attention", True) else 0
    middle = 2 * _residual(last, last) + attention
    down = sum(
        _residual(above, width) + (blocks - 1) * _residual(width, width)
        for above, width in zip((widths[0], *widths), widths, strict=False)
    )
    up = sum(
        _residual(below, width) + blocks * _residual(width, width)
        for below, width in zip((last, *reversed(widths)), reversed(widths), strict=False)
    )
    resampled = sum(_convolution(width, width) for width in widths[:-1])
    resampled += sum(_convolution(width, width) for width in widths[1:])
    encoder = _convolution(config.get("in_channels", 3), widths[0]) + down + middle + _norm(last)
    encoder += _convolution(last, 2 * latent)
    decoder = _convolution(latent, last) + middle + up + _norm(widths[0])
    decoder += _convolution(widths[0], config.get("out_channels", 3))
    quantised = _linear(2 * latent, 2 * latent) if config.get("use_quant_conv", True) else 0
    quantised += _linear(latent, latent) if config.get("use_post_quant_conv", True) else 0
    return int(encoder + decoder + resampled + quantised)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _norm(width: int) -> int:
    return 2 * width


def _convolution(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def _residual(inputs: int, outputs: int) -> int:
    convolutions = _convolution(inputs, outputs) + _convolution(outputs, outputs)
    shortcut = 0 if inputs == outputs else _linear(inputs, outputs)
    return _norm(inputs) + _norm(outputs) + convolutions + shortcut


COUNT: Mapping[str, Callable[[Config, int], int]] = {
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": clip_projected,
    "T5EncoderModel": t5,
    "StableDiffusionSafetyChecker": safety_checker,
    "AutoencoderKL": autoencoder,
}
