"""Which backend a run takes: ours where it can do all that is asked, diffusers otherwise, with the reason."""

from collections.abc import Callable, Iterator

from sglang_gen.config.schema import BackendName, CacheMethod, GuidanceBatching, QuantMethod, Run
from sglang_gen.errors import UserError
from sglang_gen.hub import weight_files
from sglang_gen.plan import offloading
from sglang_gen.plan.supported_configs import NEEDS, unsupported
from sglang_gen.types import ModelCard

# Pipelines of the native engine: the class that model_index.json names, and the module in pipelines/.
NATIVE = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionPipeline": "sd",
}
# Names of its attention kernels; which of them run depends on the machine.
ATTENTION = ("auto", "sdpa", "flash", "efficient", "cudnn", "math", "flash_attn", "flash_attn_3", "sage", "flex")
ARGUMENTS = {  # of --diffusers-kwargs that it understands
    "FluxPipeline": {"true_cfg_scale"},
    "StableDiffusionXLPipeline": {"guidance_rescale"},
    "StableDiffusionPipeline": {"guidance_rescale"},
}


def choose(run: Run, card: ModelCard, device: str) -> tuple[str, str | None]:
    """(sglang or diffusers, why auto did not take sglang). Raises UserError where sglang is asked for and cannot."""
    own = next((path for path, asked in NATIVE_ONLY if asked(run)), None)
    if run.backend.name is BackendName.diffusers:
        if own:
            raise UserError(f"{own} is a setting of the native engine alone; run with --backend sglang or auto")
        return "diffusers", None
    reason = next(_obstacles(run, card, device), None)
    if reason is None:
        return "sglang", None
    if run.backend.name is BackendName.sglang:
        raise UserError(f"The native engine cannot run this: {reason}; run with --backend diffusers or auto")
    if own:
        raise UserError(f"{own} is a setting of the native engine alone, which cannot run this: {reason}")
    return "diffusers", reason


def check_start(run: Run) -> None:
    """Refuse two starts for a pipeline that puts noise on a picture. Raises UserError."""
    if run.sampling.latents and run.sampling.image_path:
        raise UserError(
            "sampling.latents and sampling.image_path exclude each other: the one is what the first step starts from, "
            "and so is the other with noise on it; give one"
        )


# What a run can ask for that the diffusers backend does not have.
NATIVE_ONLY: tuple[tuple[str, Callable[[Run], bool]], ...] = (
    ("sampling.guidance_interval", lambda run: run.sampling.guidance_interval is not None),
    ("sampling.guidance_batching", lambda run: run.sampling.guidance_batching is not GuidanceBatching.auto),
    ("compile.cuda_graphs", lambda run: run.compile.cuda_graphs),
)


def _obstacles(run: Run, card: ModelCard, device: str) -> Iterator[str]:
    """What the native engine does not do, in the order in which a user would like to hear it."""
    name = run.model.pipeline_class_name or card.pipeline_class
    if name not in NATIVE:
        yield f"it has no {name} (it has {', '.join(NATIVE)})"
    understood = ARGUMENTS.get(name, set()) | ({"strength"} if run.sampling.image_path else set())
    foreign = run.backend.diffusers_kwargs.keys() - understood
    if foreign:
        yield f"'{min(foreign)}' of --diffusers-kwargs is for the diffusers pipeline"
    if card.code:
        yield "it runs no code from model repositories"
    if device != "cpu" and offloading.asked(run):  # on a CPU they have no effect
        yield "it does not offload yet"
    if any("quantization_config" in part.config for part in card.components.values()):
        yield "the model's weights are quantized"
    if run.quant.transformer_weights_path and (reason := _foreign_weights(run.quant.transformer_weights_path)):
        yield reason
    if run.sampling.image_path and card.settings.get("requires_aesthetics_score"):
        yield "it gives an input picture no aesthetic score, and this model wants one"
    if name in NATIVE and (reason := unsupported(NEEDS[NATIVE[name]], card)):
        yield reason
    yield from (reason for asked, reason in NATIVE_LACKS if asked(run))


def _foreign_weights(path: str) -> str | None:
    """Why the native engine cannot read these files, by name and header; None for plain ones. Raises UserError."""
    files = weight_files.locate(path)
    if files.is_gguf:
        return "it reads no GGUF files yet"
    found = weight_files.declared(files.config, weight_files.read_headers(files.paths).metadata)
    return f"it reads no weights that are quantized by {found['method']} yet" if found else None


# What a run can ask for that the native engine does not have.
NATIVE_LACKS: tuple[tuple[Callable[[Run], object], str], ...] = (
    (lambda run: run.lora.path or run.lora.adapters, "it has no LoRA adapters yet"),
    (lambda run: run.quant.method is not QuantMethod.none, "it has no quantized weights yet"),
    (lambda run: run.cache.method is not CacheMethod.none or run.cache.cache_dit_config, "it has no step cache yet"),
    # asked by name, the engine says itself which kernels run here
    (
        lambda run: run.attention.backend not in ATTENTION and run.backend.name is not BackendName.sglang,
        f"its attention kernels are {', '.join(ATTENTION)}",
    ),
)
