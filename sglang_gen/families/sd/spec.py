"""Facts about Stable Diffusion 1 and 2."""

from collections.abc import Sequence

from sglang_gen.families import unet_spec
from sglang_gen.families.accepted import ANY, CLIP, VAE
from sglang_gen.families.contract import ComponentConfig, Spec, configured_size
from sglang_gen.types import Size

OLD_SIDE = 64  # minimum size in latents for configurations of diffusers before 0.9, whose sample_size is too small


def default_size(config: ComponentConfig, factor: int) -> Size:
    """`configured_size`, also for configurations of diffusers before 0.9."""
    sides = config.get("sample_size")
    if isinstance(sides, Sequence):
        return Size(int(sides[0]) * factor, int(sides[1]) * factor)
    size = configured_size(config, factor)
    version = config.get("_diffusers_version", "0.9").split(".")
    if (int(version[0]), int(version[1])) < (0, 9) and size.height < OLD_SIDE * factor:
        return Size(OLD_SIDE * factor, OLD_SIDE * factor)
    return size


SPEC = Spec(
    name="sd",
    pipeline_class="StableDiffusionPipeline",
    networks=("unet",),
    components={
        "unet": ("UNet2DConditionModel",), "vae": VAE, "scheduler": ANY, "text_encoder": CLIP, "tokenizer": ANY,
    },
    optional={"safety_checker": ("StableDiffusionSafetyChecker",), "feature_extractor": ("CLIPImageProcessor",)},
    settings=unet_spec.SETTINGS,
    file_prefixes={"text_encoder": ("cond_stage_model.",)},
    arguments=frozenset({"guidance_rescale"}),
    strength=0.8,
    keeps_image_size=True,
    scheduler_settings={"steps_offset": 1, "clip_sample": False},
    schedulers=unet_spec.SCHEDULERS,
    default_size=default_size,
    skip_connections=unet_spec.skip_connections,
    heads=unet_spec.heads,
    head_widths=unet_spec.head_widths,
    channels=unet_spec.channels,
    units=unet_spec.bands,
)  # fmt: skip
