"""Sizes of images, videos and texts: a model's default, and the sizes that it supports."""

from sglang_gen.config.schema import Run, Sampling
from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.families.contract import ComponentConfig, Spec
from sglang_gen.types import DENOISERS, ModelCard, Plan, Size


def chosen(sampling: Sampling, spec: Spec, config: ComponentConfig, factor: int) -> Size:
    """Requested size in pixels, completed by the model's default. Raises UserError if it has none."""
    frames = 1 if spec.video is None else sampling.num_frames or spec.video.frames
    if sampling.height and sampling.width:
        return Size(sampling.height, sampling.width, frames)
    size = spec.default_size(config, factor)
    return Size(sampling.height or size.height, sampling.width or size.width, frames)


def latent_factor(card: ModelCard) -> int | None:
    """Pixels per latent in each dimension; None if the autoencoder is not an AutoencoderKL."""
    vae = card.components.get("vae")
    if vae is None or vae.class_name != "AutoencoderKL" or not vae.config.get("block_out_channels"):
        return None
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def multiple(card: ModelCard) -> int | None:
    """Number of pixels of which height and width must be multiples: VAE downsampling factor times patch size."""
    factor, network = latent_factor(card), card.components.get(DENOISERS[0])
    patch = registry.packing(network.class_name)(network.config) if network else 1
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
            raise UserError(f"sampling.{name} is {value}; this model supports at most {most} pixels per side")


def check_frames(run: Run, spec: Spec) -> None:
    """Raises UserError for a number of frames that is not a whole number of latent frames."""
    frames, video = run.sampling.num_frames, spec.video
    if video is None or frames is None or video.allows(frames):
        return
    below = 1 + (frames - 1) // video.step * video.step
    raise UserError(
        f"sampling.num_frames is {frames}; this model takes multiples of {video.step} plus 1, such as {below} or "
        f"{below + video.step}"
    )


def check_text_length(run: Run, card: ModelCard) -> None:
    """Raises UserError for more text tokens than the pipeline takes."""
    pipeline_class = run.model.pipeline_class_name or card.pipeline_class
    spec, length = registry.by_pipeline_class(pipeline_class), run.sampling.max_sequence_length
    if spec is not None and length is not None and spec.most_text_tokens and length > spec.most_text_tokens:
        most = f"{pipeline_class} takes at most {spec.most_text_tokens}"
        raise UserError(f"sampling.max_sequence_length is {length}; {most}")


def _most(card: ModelCard) -> int | None:
    """Maximum height and width in pixels that a network has positions for; None without a limit."""
    step, network = multiple(card), card.components.get(DENOISERS[0])
    spec = registry.by_network_class(network.class_name) if network else None
    if step is None or network is None or spec is None:
        return None
    patches = spec.most_patches(network.config)
    return None if patches is None else patches * step


def expected(plan: Plan) -> Size | None:
    """Size of a run's images or videos; None if it is known only to its pipeline or from its input image."""
    sampling, card = plan.run.sampling, plan.card
    if sampling.image_path:
        return None
    spec = registry.by_pipeline_class(plan.pipeline_class)
    if plan.backend == "sglang" and spec:
        return chosen(sampling, spec, card.components[spec.network].config, latent_factor(card) or 1)
    if sampling.height and sampling.width and multiple(card):
        return Size(sampling.height, sampling.width)
    return None
