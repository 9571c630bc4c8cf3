"""A whole model in one safetensors file, in its authors' layout: what it holds, told by the names in its header."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace

from sglang_gen.errors import UserError
from sglang_gen.safetensors_file import header, refuse_other_formats
from sglang_gen.types import Component

NETWORKS = ("unet", "transformer")
VAE = ("first_stage_model.", "vae.")
T5 = ("text_encoders.t5xxl.",)
CLIP = {  # prefixes under which the layouts of SD 1.5 and 2, SDXL, its refiner, SD3 and FLUX keep a text encoder
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model.", "text_encoders.clip_g."),
}
OTHERS = (*VAE, *T5, *CLIP["text_encoder"], *CLIP["text_encoder_2"])
BARE = ("double_blocks.", "joint_blocks.", "blocks.", "transformer_blocks.", "down_blocks.", "input_blocks.")


def read(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a checkpoint that can be a whole model. Raises UserError for any other file."""
    if path.suffix.lower() == ".gguf":
        raise UserError(f"--model-path: {path} holds a quantized network alone; {_whole_model(path)}")
    refuse_other_formats(path, "--model-path")
    shapes = header(path)
    if any(".lora" in name or name.startswith("lora_") for name in shapes):
        raise UserError(
            f"--model-path: {path} is a LoRA adapter; name it with --lora-path and the model with --model-path"
        )
    if not _network(shapes):
        raise UserError(f"--model-path: {path} holds no denoising network, so it is not a whole model")
    if not _any(shapes, OTHERS):
        raise UserError(f"--model-path: {path} holds a denoising network alone; {_whole_model(path)}")
    return shapes


def _whole_model(path: Path) -> str:
    return f"name the whole model with --model-path, and this file with --transformer-weights-path {path}"


def _any(names: Collection[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _network(names: Collection[str]) -> bool:
    return _any(names, ("model.diffusion_model.", *BARE))


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
        return ("model.diffusion_model.", *BARE)
    if part == "vae":
        return VAE
    if component.class_name == "T5EncoderModel":
        return T5
    if part.startswith("text_encoder"):
        return CLIP.get(part, ("text_encoders.",))
    return None


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
