"""Facts about FLUX.1."""

from sglang_gen.families.accepted import ANY, CLIP, T5, VAE, anything, number, one_of
from sglang_gen.families.contract import EMBEDDED, ComponentConfig, Spec
from sglang_gen.types import Size

SIDE = 128  # default size in latents; the configuration has no sample_size


def default_size(config: ComponentConfig, factor: int) -> Size:
    return Size(SIDE * factor, SIDE * factor)


def patch(config: ComponentConfig) -> int:
    """The pipeline packs 2 x 2 latents into one token, outside of the network."""
    return 2


def tokens(config: ComponentConfig, size: Size, factor: int) -> tuple[int, str]:
    return (size.height // factor // 2) * (size.width // factor // 2), "tokens"


SPEC = Spec(
    name="flux",
    pipeline_class="FluxPipeline",
    components={
        "transformer": ("FluxTransformer2DModel",), "vae": VAE, "scheduler": ANY,
        "text_encoder": CLIP, "text_encoder_2": T5, "tokenizer": ANY, "tokenizer_2": ANY,
    },
    settings={
        "patch_size": one_of(1), "in_channels": number, "out_channels": anything, "num_layers": number,
        "num_single_layers": number, "num_attention_heads": number, "attention_head_dim": number,
        "joint_attention_dim": number, "pooled_projection_dim": number, "guidance_embeds": anything,
        "axes_dims_rope": anything,
    },
    file_prefixes={"text_encoder": ("text_encoders.clip_l.",)},
    converts_original=True,
    arguments=frozenset({"true_cfg_scale"}),
    guidance=EMBEDDED,
    text_length=512,
    most_text_tokens=512,
    default_size=default_size,
    patch=patch,
    packs_like=("Flux",),
    units=tokens,
)  # fmt: skip
