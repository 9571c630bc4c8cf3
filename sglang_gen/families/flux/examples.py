"""Examples of FLUX.1."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang_gen.families.contract import ComponentConfig
from sglang_gen.families.examples_contract import Examples, NetworkBenchmark, RunBenchmark, filled

DEV = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}  # fmt: skip
LAPTOP = {
    "patch_size": 1, "in_channels": 64, "num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128,
    "num_attention_heads": 8, "joint_attention_dim": 1024, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
MIDSIZE: Mapping[str, ComponentConfig] = {
    "transformer": {"num_attention_heads": 8, "num_layers": 2, "num_single_layers": 4, "joint_attention_dim": 512},
    "text_encoder": {"num_hidden_layers": 4},
    "text_encoder_2": {
        "d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4,
    },
}  # fmt: skip
PUBLISHED = NetworkBenchmark(title="FLUX.1 dev, 1024 x 1024", preset="flux_dev", batch=1, tokens=512, side=64)


class FluxExamples(Examples):
    tiny: ClassVar[ComponentConfig] = DEV | {"pooled_projection_dim": 32}
    variants: ClassVar[Mapping[str, ComponentConfig]] = {
        "dev": DEV,
        "schnell": DEV | {"guidance_embeds": False},
        "three heads, more single blocks": DEV
        | {"num_attention_heads": 3, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4), "num_single_layers": 4},
    }
    size = (5, 7)
    networks: ClassVar[Mapping[str, NetworkBenchmark]] = {
        "dit": NetworkBenchmark(
            title="FLUX-shaped DiT, 285 M, 1024 + 128 tokens", config=LAPTOP, batch=1, tokens=128, side=32
        ),
        "flux_dev": PUBLISHED,
    }
    runs: ClassVar[Mapping[str, RunBenchmark]] = {
        "flux_dev": RunBenchmark(
            title="FLUX.1 dev, 1024 x 1024, 28 steps", preset="flux_dev", side=1024, steps=28, network=PUBLISHED,
            target=3.3,
        ),
        "midsize_flux": RunBenchmark(
            title="a FLUX of 323 M, 384 x 384, 4 steps", preset="flux_dev", side=384, steps=4, changes=MIDSIZE,
            network=NetworkBenchmark(title="mid-size", preset="flux_dev", batch=1, tokens=512, side=24),
        ),
    }  # fmt: skip

    def shapes(self, config: ComponentConfig, tokens: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        latents, text = (height * width, config["in_channels"]), (tokens, config["joint_attention_dim"])
        return latents, text, (config["pooled_projection_dim"],)

    def conditions(self, given: tuple[Any, ...], height: int, width: int, guidance: float) -> tuple[Any, ...]:
        return (*given, 1000 * guidance, height, width)

    def arguments(
        self,
        config: ComponentConfig,
        latents: Tensor,
        given: tuple[Tensor, ...],
        timestep: Tensor,
        height: int,
        width: int,
        guidance: float,
    ) -> dict[str, Any]:
        text, pooled = given
        grid = torch.zeros(height, width, 3, device=latents.device)
        grid[..., 1] += torch.arange(height, device=latents.device)[:, None]
        grid[..., 2] += torch.arange(width, device=latents.device)
        scale = filled(len(latents), guidance, latents) if config.get("guidance_embeds") else None
        return {
            "hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": pooled,
            "timestep": timestep / 1000, "guidance": scale, "img_ids": grid.flatten(0, 1),
            "txt_ids": torch.zeros(text.shape[1], 3, device=latents.device),
        }  # fmt: skip


EXAMPLES: type[Examples] = FluxExamples
