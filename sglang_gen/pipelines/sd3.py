"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, flow matching, an autoencoder with a shift."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.engine.denoise import draw_noise
from sglang_gen.engine.patterns import Grid
from sglang_gen.models.sd3 import SD3, Block, Conditioning, Config
from sglang_gen.pipelines import text
from sglang_gen.pipelines.flow import set_timesteps
from sglang_gen.pipelines.request import Request
from sglang_gen.weights.load import renamed

NETWORK = "transformer"
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
INEFFECTIVE_NEGATIVE = "The negative prompt has no effect at a guidance scale of {scale}"
REGIONS = (Block,)  # compiled once for all repeats
T5_LENGTH = 256  # tokens, unless sampling.max_sequence_length says otherwise
MOST_TOKENS = 512
ZERO_WITHOUT_NEGATIVE = False
SCHEDULER: Mapping[str, Any] = {}

# Parts of our names of tensors, and what stands there in a diffusers checkpoint.
NAMES = {
    "patches": ("pos_embed.proj",),
    "positions": ("pos_embed.pos_embed",),
    "timestep_embedder": ("time_text_embed.timestep_embedder",),
    "pooled_embedder": ("time_text_embed.text_embedder",),
    "text_embedder": ("context_embedder",),
    "blocks": ("transformer_blocks",),
    "modulation": ("norm1",),
    "text_modulation": ("norm1_context",),
    "out_modulation": ("norm_out",),
    "out": ("proj_out",),
    "attention.image": ("attn",),
    "attention.image.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.text.to_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attention.text.norm_q": ("attn.norm_added_q",),
    "attention.text.norm_k": ("attn.norm_added_k",),
    "attention.to_out": ("attn.to_out.0",),
    "attention.to_text_out": ("attn.to_add_out",),
    "attention_2.image": ("attn2",),
    "attention_2.image.to_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attention_2.to_out": ("attn2.to_out.0",),
    "ff_text": ("ff_context",),
    "up": ("net.0.proj",),
    "down": ("net.2",),
}


def sources(name: str) -> list[str]:
    """The names in a diffusers checkpoint that make up our tensor `name`."""
    return renamed(name, NAMES)


def config(diffusers_config: Mapping[str, Any]) -> Config:
    c = diffusers_config
    return Config(
        patch=c["patch_size"], channels_in=c["in_channels"], channels_out=c.get("out_channels") or c["in_channels"],
        layers=c["num_layers"], heads=c["num_attention_heads"], head_dim=c["attention_head_dim"],
        text_width=c["joint_attention_dim"], pooled_width=c["pooled_projection_dim"],
        positions=c["pos_embed_max_size"], dual_layers=tuple(c.get("dual_attention_layers") or ()),
        qk_norm=c.get("qk_norm") == "rms_norm",
    )  # fmt: skip


def build(diffusers_config: Mapping[str, Any]) -> nn.Module:
    return SD3(config(diffusers_config))


def encode(parts: Mapping[str, Any], texts: list[str], length: int | None) -> tuple[Tensor, Tensor]:
    """Text `[B, T, C]` and pooled text `[B, P]`: both CLIP encoders side by side, T5 behind them."""
    first, pooled = text.clip(parts["text_encoder"], parts["tokenizer"], texts)
    second, pooled_2 = text.clip(parts["text_encoder_2"], parts["tokenizer_2"], texts)
    both = torch.cat([first, second], dim=-1)
    t5 = text.t5(parts["text_encoder_3"], parts["tokenizer_3"], texts, length or T5_LENGTH)
    return torch.cat([text.pad_channels(both, t5.shape[-1]), t5], dim=1), torch.cat([pooled, pooled_2], dim=-1)


def branches(guidance: float, true_cfg: float, negative: bool) -> float:
    """The scale of classifier-free guidance."""
    return guidance


def default_size(diffusers_config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    size = int(diffusers_config["sample_size"]) * factor
    return size, size


def start(
    diffusers_config: Mapping[str, Any],
    scheduler: Any,
    request: Request,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype,
) -> Tensor:
    """Set the timesteps and draw the noise `[B, C, h, w]` that the first step starts from."""
    height, width = request.latent_size
    patch = diffusers_config["patch_size"]
    set_timesteps(scheduler, request.steps, (height // patch) * (width // patch), 1.16)
    return draw_noise((diffusers_config["in_channels"], height, width), generators, dtype)


def grids(config: Config, request: Request, encoded: Sequence[tuple[Tensor, ...]]) -> list[Grid]:
    """Where the picture stands in the sequences that attention sees: before the text, or alone."""
    rows, columns = (size // config.patch for size in request.latent_size)
    return [Grid(rows, columns, after=encoded[0][0].shape[1]), Grid(rows, columns)]


def prepare(
    network: SD3, scheduler: Any, request: Request, encoded: Sequence[tuple[Tensor, Tensor]]
) -> "partial[Tensor]":
    """What predicts the velocity of the latents: the network with everything that all steps share."""
    states, pooled = (torch.cat(part) for part in zip(*encoded, strict=True))
    conditioning = network.condition(scheduler.timesteps, states, pooled, *request.latent_size)
    return partial(_predict, network, conditioning)


def _predict(network: SD3, conditioning: Conditioning, latents: Tensor, step: int) -> Tensor:
    return network(latents, conditioning, step)


def decode(vae: Any, latents: Tensor, request: Request) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1."""
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(scaled, return_dict=False)[0]
