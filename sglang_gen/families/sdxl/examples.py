"""Examples of Stable Diffusion XL."""

from collections.abc import Mapping
from typing import ClassVar

from sglang_gen.families.contract import ComponentConfig
from sglang_gen.families.examples_contract import Examples, NetworkBenchmark, RunBenchmark
from sglang_gen.families.unet_examples import UNetExamples

LAPTOP = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 512), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 6),
    "attention_head_dim": (2, 4, 8), "cross_attention_dim": 1024, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 768,
    "use_linear_projection": True,
}  # fmt: skip
NARROW = {"num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
MIDSIZE: Mapping[str, ComponentConfig] = {
    "unet": {
        "block_out_channels": [160, 320, 640], "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 4, 8], "cross_attention_dim": 1024,
        "projection_class_embeddings_input_dim": 512 + 6 * 256,
    },
    "text_encoder": NARROW, "text_encoder_2": NARROW | {"projection_dim": 512},
}  # fmt: skip
PUBLISHED = NetworkBenchmark(title="SDXL, 1024 x 1024, batch 2", preset="sdxl", batch=2, tokens=77, side=128)
TEXT_ENCODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32,
}  # fmt: skip
THIN: Mapping[str, ComponentConfig] = {
    "unet": {
        "sample_size": 16, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2), "attention_head_dim": (1, 2), "cross_attention_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 256 + 32,
    },
    "vae": {
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1,
    },
    "text_encoder": TEXT_ENCODER,
    "text_encoder_2": TEXT_ENCODER,
}  # fmt: skip


class SDXLExamples(UNetExamples):
    tiny: ClassVar[ComponentConfig] = {
        "block_out_channels": (16, 32), "layers_per_block": 2, "sample_size": 16, "cross_attention_dim": 64,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + 32,
    }  # fmt: skip
    variants: ClassVar[Mapping[str, ComponentConfig]] = {
        "sdxl": {
            "block_out_channels": (16, 32, 48), "layers_per_block": 2, "cross_attention_dim": 24, "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4, 6), "transformer_layers_per_block": (1, 2, 2), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
    }  # fmt: skip
    networks: ClassVar[Mapping[str, NetworkBenchmark]] = {
        "unet": NetworkBenchmark(
            title="SDXL-shaped UNet, 64 x 64 latents, batch 2", config=LAPTOP, batch=2, tokens=77, side=64
        ),
        "sdxl": PUBLISHED,
    }
    runs: ClassVar[Mapping[str, RunBenchmark]] = {
        "tiny": RunBenchmark(
            title="a tiny SDXL, 32 x 32, 3 steps with guidance", preset="sdxl", side=32, steps=3, changes=THIN,
            network=NetworkBenchmark(title="tiny", preset="sdxl", batch=2, tokens=77, side=16),
        ),
        "sdxl": RunBenchmark(
            title="SDXL, 1024 x 1024, 50 steps with guidance", preset="sdxl", side=1024, steps=50, network=PUBLISHED,
            target=1.6,
        ),
        "midsize_sdxl": RunBenchmark(
            title="an SDXL of 373 M, 384 x 384, 4 steps with guidance", preset="sdxl", side=384, steps=4,
            changes=MIDSIZE, network=NetworkBenchmark(title="mid-size", preset="sdxl", batch=2, tokens=77, side=48),
        ),
    }  # fmt: skip


EXAMPLES: type[Examples] = SDXLExamples
