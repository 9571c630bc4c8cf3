"""Image sizes: a model's default, and the sizes that it supports."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_gen.config.schema import Run, Sampling
from sglang_gen.errors import UserError
from sglang_gen.plan.backend_choice import NATIVE
from sglang_gen.plan.supported_configs import NEEDS
from sglang_gen.types import DENOISERS, ModelCard, Plan

Default = Callable[[Mapping[str, Any], int], tuple[int, int]]
FLUX_SIDE = 128  # default size in latents; FLUX's configuration has no sample_size
OLD_SIDE = 64  # minimum size in latents for configurations of diffusers before 0.9, whose sample_size is too small


def configured(config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Default height and width in pixels from the network's sample_size; `factor` pixels per latent.

    Raises UserError if the configuration has no sample_size.
    """
    side = config.get("sample_size")
    if not isinstance(side, int):
        raise UserError("The model's configuration has no default image size; give --height and --width")
    return side * factor, side * factor


def configured_long_ago(config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """`configured` for Stable Diffusion 1 and 2, whose configurations may be those of diffusers before 0.9."""
    size = config.get("sample_size")
    if isinstance(size, Sequence):
        return int(size[0]) * factor, int(size[1]) * factor
    height, width = configured(config, 1)
    version = config.get("_diffusers_version", "0.9").split(".")
    if (int(version[0]), int(version[1])) < (0, 9) and height < OLD_SIDE:
        height = width = OLD_SIDE
    return height * factor, width * factor


def of_flux(config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    return FLUX_SIDE * factor, FLUX_SIDE * factor


def chosen(sampling: Sampling, default: Default, config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Requested height and width in pixels, completed by the model's default. Raises UserError if it has none."""
    if sampling.height and sampling.width:
        return sampling.height, sampling.width
    height, width = default(config, factor)
    return sampling.height or height, sampling.width or width


# Default sizes of the native engine's pipelines.
DEFAULT: Mapping[str, Default] = {
    "sd3": configured, "flux": of_flux, "sdxl": configured, "sd": configured_long_ago,
}  # fmt: skip


def latent_factor(card: ModelCard) -> int | None:
    """Pixels per latent in each dimension; None if the autoencoder is not an AutoencoderKL."""
    vae = card.components.get("vae")
    if vae is None or vae.class_name != "AutoencoderKL" or not vae.config.get("block_out_channels"):
        return None
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def multiple(card: ModelCard) -> int | None:
    """Number of pixels of which height and width must be multiples: VAE downsampling factor times patch size."""
    factor, network = latent_factor(card), card.components.get(DENOISERS[0])
    patch = network.config.get("patch_size", 1) if network else 1
    if network and "Flux" in network.class_name:
        patch = 2  # FLUX packs 2 x 2 latents into one token outside of the network
    return factor * patch if factor and isinstance(patch, int) else None


def check_size(run: Run, card: ModelCard) -> None:
    """Raises UserError for a size that is not a multiple of the model's patch size or exceeds its maximum."""
    step, most = multiple(card), _most(card)
    for name in ("height", "width"):
        value = getattr(run.sampling, name)
        if step and value is not None and value % step:
            below, above = value // step * step, (value // step + 1) * step
            choice = f"{below} or {above}" if below else str(above)
            raise UserError(f"sampling.{name} is {value}; this model takes multiples of {step}, such as {choice}")
        if most and value is not None and value > most:
            raise UserError(f"sampling.{name} is {value}; this model has positions for {most} pixels a side")


def _most(card: ModelCard) -> int | None:
    """Maximum height and width in pixels of SD3's table of position embeddings; None for other models."""
    step, network = multiple(card), card.components.get(DENOISERS[0])
    if step is None or network is None or network.class_name != "SD3Transformer2DModel":
        return None
    return int(network.config.get("pos_embed_max_size", 96)) * step


def expected(plan: Plan) -> tuple[int, int] | None:
    """Height and width of a run's images; None if they are known only to its pipeline or from its input image."""
    sampling, card = plan.run.sampling, plan.card
    if sampling.image_path:
        return None
    if plan.backend == "sglang":
        pipeline = NATIVE[plan.pipeline_class]
        config = card.components[NEEDS[pipeline].network].config
        return chosen(sampling, DEFAULT[pipeline], config, latent_factor(card) or 1)
    if sampling.height and sampling.width and multiple(card):
        return sampling.height, sampling.width
    return None
