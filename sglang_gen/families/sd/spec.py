"""Facts about Stable Diffusion 1 and 2."""

from collections.abc import Sequence

from sglang_gen.families import unet_spec
from sglang_gen.families.accepted import ANY, CLIP, VAE
from sglang_gen.families.contract import ComponentConfig, Spec, configured_size

OLD_SIDE = 64  # minimum size in latents for configurations of diffusers before 0.9, whose sample_size is too small


def default_size(config: ComponentConfig, factor: int) -> tuple[int, int]:
    """`configured_size`, also for configurations of diffusers before 0.9."""
    size = config.get("sample_size")
    if isinstance(size, Sequence):
        return int(size[0]) * factor, int(size[1]) * factor
    height, width = configured_size(config, 1)
    version = config.get("_diffusers_version", "0.9").split(".")
    if (int(version[0]), int(version[1])) < (0, 9) and height < OLD_SIDE:
        height = width = OLD_SIDE
    return height * factor, width * factor


SPEC = Spec(
    name="sd",
    pipeline_class="StableDiffusionPipeline",
    network="unet",
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
    heads=unet_spec.heads,
    channels=unet_spec.channels,
    units=unet_spec.bands,
)  # fmt: skip
