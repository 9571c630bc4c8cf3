"""Facts about Stable Diffusion 3 and 3.5."""

from sglang_gen.families.accepted import ANY, CLIP_PROJECTED, T5, VAE, anything, number, one_of
from sglang_gen.families.contract import ComponentConfig, Spec


def table_of_positions(config: ComponentConfig) -> int:
    """Patches along a side of the table of position embeddings."""
    return int(config.get("pos_embed_max_size", 96))


SPEC = Spec(
    name="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    components={
        "transformer": ("SD3Transformer2DModel",), "vae": VAE, "scheduler": ANY,
        "text_encoder": CLIP_PROJECTED, "text_encoder_2": CLIP_PROJECTED, "tokenizer": ANY, "tokenizer_2": ANY,
    },
    optional={"text_encoder_3": T5, "tokenizer_3": ANY},
    settings={
        "sample_size": number, "patch_size": number, "in_channels": number, "out_channels": anything,
        "num_layers": number, "num_attention_heads": number, "attention_head_dim": number,
        "joint_attention_dim": number, "caption_projection_dim": number, "pooled_projection_dim": number,
        "pos_embed_max_size": number, "dual_attention_layers": anything, "qk_norm": one_of(None, "rms_norm"),
    },
    file_prefixes={"text_encoder": ("text_encoders.clip_l.",), "text_encoder_2": ("text_encoders.clip_g.",)},
    text_length=256,
    most_text_tokens=512,
    most_patches=table_of_positions,
)  # fmt: skip
