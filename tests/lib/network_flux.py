"""Tiny FLUX networks: configurations, diffusers' network of one with its inputs, and what each of the two computes."""

import tiny
import torch
from diffusers import FluxTransformer2DModel

TIMESTEPS = torch.tensor([987.6, 500.0, 7.5])
ROWS, COLUMNS = 5, 7
DEV = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}  # fmt: skip
VARIANTS = {
    "dev": DEV,
    "schnell": DEV | {"guidance_embeds": False},
    "three heads, more single blocks": DEV
    | {"num_attention_heads": 3, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4), "num_single_layers": 4},
}


def reference(**config) -> FluxTransformer2DModel:
    return tiny.fill(FluxTransformer2DModel(**config), 5)


def inputs(config: dict, dtype: torch.dtype, batch: int = 3):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (ROWS * COLUMNS, config["in_channels"]),
        (9, config["joint_attention_dim"]),
        (config["pooled_projection_dim"],),
    )
    return tuple(torch.randn((batch, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


@torch.no_grad()
def theirs(network, latents, text, pooled, step: int, guidance: float = 3.5) -> torch.Tensor:
    ids = torch.zeros(ROWS, COLUMNS, 3)
    ids[..., 1] += torch.arange(ROWS)[:, None]
    ids[..., 2] += torch.arange(COLUMNS)
    scale = torch.full((len(latents),), guidance) if network.config.guidance_embeds else None
    return network(
        hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled, guidance=scale,
        timestep=TIMESTEPS[step].expand(len(latents)) / 1000, img_ids=ids.flatten(0, 1),
        txt_ids=torch.zeros(text.shape[1], 3), return_dict=False,
    )[0]  # fmt: skip


@torch.no_grad()
def ours(network, latents, text, pooled, step: int, guidance: float = 3.5) -> torch.Tensor:
    return network(latents, network.condition(TIMESTEPS, text, pooled, 1000 * guidance, ROWS, COLUMNS), step)
