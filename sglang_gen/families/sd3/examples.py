"""Examples of Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sglang_gen.families.contract import ComponentConfig
from sglang_gen.families.examples_contract import Examples, NetworkBenchmark

PLAIN = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20,
    "out_channels": 4, "pos_embed_max_size": 20,
}  # fmt: skip


class SD3Examples(Examples):
    tiny: ClassVar[ComponentConfig] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 32,
        "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 32, "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }  # fmt: skip
    variants: ClassVar[Mapping[str, ComponentConfig]] = {
        "sd3": PLAIN,
        "sd35-large": PLAIN | {"qk_norm": "rms_norm"},
        "sd35-medium": PLAIN | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        "three heads, other channels": PLAIN
        | {
            "num_attention_heads": 3, "caption_projection_dim": 24, "in_channels": 6, "out_channels": 3,
            "patch_size": 1,
        },
    }  # fmt: skip
    networks: ClassVar[Mapping[str, NetworkBenchmark]] = {
        "landscape": NetworkBenchmark(title="landscape, batch 2", batch=2, tokens=109)
    }

    def shapes(self, config: ComponentConfig, tokens: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        latents, text = (config["in_channels"], height, width), (tokens, config["joint_attention_dim"])
        return latents, text, (config["pooled_projection_dim"],)

    def conditions(self, given: tuple[Any, ...], height: int, width: int, guidance: float) -> tuple[Any, ...]:
        return (*given, height, width)

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
        arguments = {"hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": pooled}
        return {**arguments, "timestep": timestep}


EXAMPLES: type[Examples] = SD3Examples
