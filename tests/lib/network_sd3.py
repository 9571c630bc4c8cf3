"""Tiny SD3 networks: configurations, diffusers' network of one with its inputs, and what each of the two computes."""

import tiny
import torch
from diffusers import SD3Transformer2DModel

TIMESTEPS = torch.tensor([987.6, 500.0, 7.5])
PLAIN = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20,
    "out_channels": 4, "pos_embed_max_size": 20,
}  # fmt: skip
VARIANTS = {
    "sd3": PLAIN,
    "sd35-large": PLAIN | {"qk_norm": "rms_norm"},
    "sd35-medium": PLAIN | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "three heads, other channels": PLAIN
    | {"num_attention_heads": 3, "caption_projection_dim": 24, "in_channels": 6, "out_channels": 3, "patch_size": 1},
}


def reference(**config) -> SD3Transformer2DModel:
    return tiny.fill(SD3Transformer2DModel(**config), 5)


def inputs(config: dict, dtype: torch.dtype, batch: int = 3, height: int = 12, width: int = 18):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(batch, config["in_channels"], height, width),
        draw(batch, 9, config["joint_attention_dim"]),
        draw(batch, config["pooled_projection_dim"]),
    )


@torch.no_grad()
def theirs(network, latents, text, pooled, step: int) -> torch.Tensor:
    times = TIMESTEPS[step].expand(len(latents))
    return network(latents, text, pooled, times, return_dict=False)[0]


@torch.no_grad()
def ours(network, latents, text, pooled, step: int) -> torch.Tensor:
    return network(latents, network.condition(TIMESTEPS, text, pooled, *latents.shape[-2:]), step)
