"""Facts about Stable Diffusion XL."""

from sglang_gen.families import unet_spec
from sglang_gen.families.accepted import ANY, CLIP, CLIP_PROJECTED, VAE, number, one_of
from sglang_gen.families.contract import Spec

SPEC = Spec(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    networks=("unet",),
    components={
        "unet": ("UNet2DConditionModel",), "vae": VAE, "scheduler": ANY, "text_encoder": CLIP, "tokenizer": ANY,
        "text_encoder_2": CLIP_PROJECTED, "tokenizer_2": ANY,
    },
    settings={
        **unet_spec.SETTINGS,
        "addition_embed_type": one_of("text_time"),
        "addition_time_embed_dim": number,
        "projection_class_embeddings_input_dim": number,
    },
    file_prefixes={
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model."),  # the latter: the refiner
    },
    arguments=frozenset({"guidance_rescale"}),
    strength=0.3,
    keeps_image_size=True,
    zero_without_negative=True,
    schedulers=unet_spec.SCHEDULERS,
    skip_connections=unet_spec.skip_connections,
    heads=unet_spec.heads,
    head_widths=unet_spec.head_widths,
    channels=unet_spec.channels,
    units=unet_spec.bands,
)  # fmt: skip
