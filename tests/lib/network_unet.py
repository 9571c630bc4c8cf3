"""Tiny UNets: configurations, diffusers' network of one with its inputs, and what each of the two computes."""

import tiny
import torch
from diffusers import UNet2DConditionModel

TIMESTEPS = torch.tensor([981, 500, 7])
SD15 = {
    "block_out_channels": (16, 32, 32), "layers_per_block": 2, "cross_attention_dim": 24, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
SDXL = {
    "block_out_channels": (16, 32, 48), "layers_per_block": 2, "cross_attention_dim": 24, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4, 6),
    "transformer_layers_per_block": (1, 2, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
VARIANTS = {
    "sd15": SD15,
    "sd21": SD15 | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": SDXL,
    "levels of different length, other channels": SD15
    | {"layers_per_block": (1, 3, 2), "in_channels": 6, "out_channels": 3, "norm_eps": 1e-3},
}


def reference(**config) -> UNet2DConditionModel:
    return tiny.fill(UNet2DConditionModel(**config), 5)


def inputs(config: dict, dtype: torch.dtype, batch: int = 3, height: int = 8, width: int = 12):
    """Latents, text, and where the network takes them pooled text and sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    given = [draw(batch, config.get("in_channels", 4), height, width), draw(batch, 9, config["cross_attention_dim"])]
    if "addition_embed_type" in config:
        sizes = torch.tensor(
            [[64, 96, 0, 0, 64, 96], [32, 32, 4, 8, 64, 64], [1024, 768, 0, 16, 512, 512]], dtype=dtype
        )
        given += [draw(batch, 20), sizes[:batch]]
    return tuple(given)


@torch.no_grad()
def theirs(network, latents, text, *added, step: int) -> torch.Tensor:
    kwargs = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added, strict=True))} if added else {}
    return network(latents, TIMESTEPS[step], text, return_dict=False, **kwargs)[0]


@torch.no_grad()
def ours(network, latents, *conditions, step: int) -> torch.Tensor:
    return network(latents, network.condition(TIMESTEPS, *conditions), step)
