"""Chooses the backend: the native engine if it supports the request, otherwise diffusers, with the reason."""

from collections.abc import Callable, Iterator

from sglang_gen.config.schema import BackendName, CacheMethod, GuidanceBatching, QuantMethod, Run
from sglang_gen.errors import UserError
from sglang_gen.families import registry
from sglang_gen.families.contract import Spec
from sglang_gen.hub import weight_files
from sglang_gen.plan import image_size, offloading
from sglang_gen.plan.quality_request import about_images
from sglang_gen.plan.supported_configs import unsupported
from sglang_gen.types import ModelCard

# Names of the native engine's attention kernels; the machine determines which of them run.
ATTENTION = (
    "auto",
    "sdpa",
    "flash",
    "efficient",
    "cudnn",
    "math",
    "onednn",
    "flash_attn",
    "flash_attn_3",
    "sage",
    "flex",
)


def family(run: Run, card: ModelCard) -> Spec | None:
    """The model's family; None if the native engine has none for its pipeline."""
    return registry.by_pipeline_class(run.model.pipeline_class_name or card.pipeline_class)


def choose(run: Run, card: ModelCard, device: str) -> tuple[str, str | None]:
    """Return (sglang or diffusers, why auto did not choose sglang).

    Raises UserError if sglang is requested and does not support the run.
    """
    own = next((path for path, is_requested in NATIVE_ONLY if is_requested(run)), None)
    if run.backend.name is BackendName.diffusers:
        if own:
            raise UserError(f"{own} is supported only by the native engine; run with --backend sglang or auto")
        return "diffusers", None
    reason = next(_obstacles(run, card, device), None)
    if reason is None:
        return "sglang", None
    if run.backend.name is BackendName.sglang:
        raise UserError(f"The native engine cannot run this: {reason}; run with --backend diffusers or auto")
    if own:
        raise UserError(f"{own} is supported only by the native engine, which cannot run this: {reason}")
    return "diffusers", reason


def check_video(run: Run, card: ModelCard) -> None:
    """Raises UserError for a video that the native engine cannot make as requested."""
    spec = family(run, card)
    assert spec is not None  # the native engine was chosen
    image_size.check_frames(run, spec)
    if spec.video is not None and (clause := about_images(run)):
        raise UserError(f"{clause}, and {spec.pipeline_class} makes video")
    if spec.video is not None and run.attention.backend == "flex":
        raise UserError(
            f"attention=flex supports only images, and {spec.pipeline_class} generates video; use another kernel"
        )


def check_start(run: Run) -> None:
    """Raises UserError if both saved latents and an input image are given as the start of the first step."""
    if run.sampling.latents and run.sampling.image_path:
        raise UserError(
            "sampling.latents and sampling.image_path exclude each other: the first step starts either from the saved "
            "latents or from the image with noise added; give one"
        )


# Settings that only the native engine supports, and whether a run sets them.
NATIVE_ONLY: tuple[tuple[str, Callable[[Run], bool]], ...] = (
    ("sampling.guidance_interval", lambda run: run.sampling.guidance_interval is not None),
    ("sampling.guidance_batching", lambda run: run.sampling.guidance_batching is not GuidanceBatching.auto),
    ("compile.cuda_graphs", lambda run: run.compile.cuda_graphs),
    ("perf.blocks", lambda run: run.perf.blocks),
    ("cache=deepcache", lambda run: run.cache.method is CacheMethod.deepcache),
    ("cache=planned", lambda run: run.cache.method is CacheMethod.planned),
)


def _obstacles(run: Run, card: ModelCard, device: str) -> Iterator[str]:
    """Reasons why the native engine cannot run a request, the most important first."""
    spec = family(run, card)
    if spec is None:
        has = ", ".join(known.pipeline_class for known in registry.specs())
        yield f"it has no {run.model.pipeline_class_name or card.pipeline_class} (it has {has})"
    understood = (spec.arguments if spec else set()) | ({"strength"} if run.sampling.image_path else set())
    foreign = run.backend.diffusers_kwargs.keys() - understood
    if foreign:
        yield f"'{min(foreign)}' of --diffusers-kwargs is an argument of the diffusers pipeline"
    if card.code:
        yield "it runs no code from model repositories"
    if "dit_layerwise_offload" in offloading.active(run, device):
        yield "it does not stream a network block by block yet"
    if any("quantization_config" in component.config for component in card.components.values()):
        yield "the model's weights are quantized"
    if run.quant.transformer_weights_path and (reason := _foreign_weights(run.quant.transformer_weights_path)):
        yield reason
    if run.sampling.image_path and card.settings.get("requires_aesthetics_score"):
        yield "it does not support the aesthetic score that this model takes with an input image"
    if run.sampling.image_path and spec and spec.video:
        yield "it does not start a video from an input image yet"
    if spec and (reason := unsupported(spec, card)):
        yield reason
    yield from (reason for is_requested, reason in NATIVE_LACKS if is_requested(run))


def _foreign_weights(path: str) -> str | None:
    """Why the native engine cannot read these weight files, by name and header; None if it can. Raises UserError."""
    files = weight_files.locate(path)
    if files.is_gguf:
        return "it reads no GGUF files yet"
    declaration = weight_files.declared(files.config, weight_files.read_headers(files.paths).metadata)
    return f"it reads no weights that are quantized by {declaration['method']} yet" if declaration else None


# Settings that the native engine does not support: whether a run sets them, and the reason to give.
NATIVE_LACKS: tuple[tuple[Callable[[Run], object], str], ...] = (
    (lambda run: run.lora.path or run.lora.adapters, "it has no LoRA adapters yet"),
    (lambda run: run.quant.method is not QuantMethod.none, "it has no quantized weights yet"),
    # with backend=sglang the engine itself refuses the kernel and names those that run on this machine
    (
        lambda run: run.attention.backend not in ATTENTION and run.backend.name is not BackendName.sglang,
        f"its attention kernels are {', '.join(ATTENTION)}",
    ),
)
