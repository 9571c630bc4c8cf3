"""Examples of Stable Diffusion 1 and 2."""

from collections.abc import Mapping
from typing import ClassVar

from sglang_gen.families.contract import ComponentConfig
from sglang_gen.families.examples_contract import Examples
from sglang_gen.families.unet_examples import UNetExamples

SD15 = {
    "block_out_channels": (16, 32, 32), "layers_per_block": 2, "cross_attention_dim": 24, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip


class SDExamples(UNetExamples):
    tiny: ClassVar[ComponentConfig] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 16, "cross_attention_dim": 32,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2,
    }  # fmt: skip
    variants: ClassVar[Mapping[str, ComponentConfig]] = {
        "sd15": SD15,
        "sd21": SD15 | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
        "levels of different length, other channels": SD15
        | {"layers_per_block": (1, 3, 2), "in_channels": 6, "out_channels": 3, "norm_eps": 1e-3},
    }


EXAMPLES: type[Examples] = SDExamples
