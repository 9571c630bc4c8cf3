"""A whole model in one safetensors file, in its authors' layout: what it holds, told by the names in its header."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace

from sglang_gen.errors import UserError
from sglang_gen.hub.plain_numbers import require_plain
from sglang_gen.hub.safetensors_header import Header, read_header, refuse_other_formats
from sglang_gen.types import Component

NETWORKS = ("unet", "transformer")
INSIDE = "model.diffusion_model."  # the denoising network within a checkpoint of the whole model
VAE_PREFIXES = ("first_stage_model.", "vae.")
T5_PREFIXES = ("text_encoders.t5xxl.",)
# Where the layouts of SD 1.5 and 2, SDXL, its refiner, SD3 and FLUX keep a text encoder.
CLIP_PREFIXES = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model.", "text_encoders.clip_g."),
}
OTHERS = (*VAE_PREFIXES, *T5_PREFIXES, *CLIP_PREFIXES["text_encoder"], *CLIP_PREFIXES["text_encoder_2"])
BARE = ("double_blocks.", "joint_blocks.", "blocks.", "transformer_blocks.", "down_blocks.", "input_blocks.")
# Remains of a training: averaged weights, tables of the noise schedule (which the scheduler computes), the loss.
TRAINING = (
    "model_ema.", "betas", "alphas_", "sqrt_", "log_one_minus_", "posterior_", "logvar", "lvlb_weights", "denoiser.",
    "loss.", "callbacks.", "optimizer",
)  # fmt: skip
MARKERS = ("v_pred", "ztsnr", "edm_")  # what the network predicts; `prediction_type` reads them


def read(path: Path) -> Header:
    """The header of a checkpoint that can be a whole model. Raises UserError for any other file."""
    if path.suffix.lower() == ".gguf":
        raise UserError(f"--model-path: {path} holds a quantized network alone; {_whole_model(path)}")
    refuse_other_formats(path, "--model-path")
    found = read_header(path)
    shapes = found.tensors
    if any(".lora" in name or name.startswith("lora_") for name in shapes):
        raise UserError(
            f"--model-path: {path} is a LoRA adapter; name it with --lora-path and the model with --model-path"
        )
    if not _network(shapes):
        raise UserError(f"--model-path: {path} holds no denoising network, so it is not a whole model")
    if not _any(shapes, OTHERS):
        raise UserError(f"--model-path: {path} holds a denoising network alone; {_whole_model(path)}")
    require_plain(path, found)
    return found


def _whole_model(path: Path) -> str:
    return f"name the whole model with --model-path, and this file with --transformer-weights-path {path}"


def _any(names: Collection[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _network(names: Collection[str]) -> bool:
    return _any(names, (INSIDE, *BARE))


def check_whole(path: Path, names: Collection[str], parts: Mapping[str, Component], replaced: Collection[str]) -> None:
    """Refuse a checkpoint that lacks a component which comes from nowhere else. Raises UserError naming it."""
    for part, component in parts.items():
        prefixes = _prefixes(part, component)
        if prefixes is None or part in replaced or _any(names, prefixes):
            continue
        raise UserError(
            f"--model-path: {path} holds no {part} ({component.class_name}); "
            f"""give it with --component-paths '{{"{part}": "FOLDER"}}'"""
        )


def _prefixes(part: str, component: Component) -> tuple[str, ...] | None:
    """Under which names a component would stand in the file; None for one that is never in it, as a tokenizer."""
    if part in NETWORKS:
        return (INSIDE, *BARE)
    if part == "vae":
        return VAE_PREFIXES
    if component.class_name == "T5EncoderModel":
        return T5_PREFIXES
    if part.startswith("text_encoder"):
        return CLIP_PREFIXES.get(part, ("text_encoders.",))
    return None


def of_component(names: Collection[str], part: str) -> set[str]:
    """Those of a checkpoint's tensors that belong to its denoising network or its autoencoder."""
    if part == "vae":
        return {name for name in names if name.startswith(VAE_PREFIXES)}
    inside = {name for name in names if name.startswith(INSIDE)}
    return inside or {name for name in names if not name.startswith((*OTHERS, *TRAINING))}


def of_text_encoder(names: Collection[str], part: str, component: Component) -> dict[str, str]:
    """The tensors of a text encoder in a checkpoint, by the names that transformers gives them.

    Empty where the checkpoint has it in OpenCLIP's layout, whose last layer Stable Diffusion 2 leaves out on purpose.
    """
    found: dict[str, str] = {}
    for prefix in _prefixes(part, component) or ():
        inside = f"{prefix.removesuffix('transformer.')}transformer."
        theirs = {name.removeprefix(inside): name for name in names if name.startswith(inside)}
        if not any(name.startswith("resblocks.") for name in theirs):
            found |= theirs
    return {name.removeprefix("text_model."): full for name, full in found.items()}


def unclaimed(names: Collection[str], parts: Mapping[str, Component]) -> list[str]:
    """Tensors that stand under the prefix of no component, and that are no remains of a training."""
    if not any(name.startswith(INSIDE) for name in names):
        return []
    known = [_prefixes(part, component) or () for part, component in parts.items()]
    prefixes = (*(prefix for each in known for prefix in each), *TRAINING, *MARKERS)
    return sorted(name for name in names if not name.startswith(prefixes))


def source_of_configs(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The hub id whose component configs fit, as diffusers tells it by names and shapes. Raises UserError."""
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, fetch_diffusers_config

    failures = (KeyError, IndexError, TypeError, ValueError, AttributeError, UnboundLocalError)
    try:
        found = fetch_diffusers_config({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
    except failures:  # an arrangement of names that its rules do not expect
        found = None
    if found is None or (found == fetch_diffusers_config({}) and CHECKPOINT_KEY_NAMES["v1"] not in shapes):
        raise UserError(
            f"--model-path: {path} does not tell which model it is; name the preset with --model-id (sglang models "
            "lists them), or give a folder or hub id that has its component configs with model.configs=FOLDER"
        )
    return str(found["pretrained_model_name_or_path"])
