"""Single-file checkpoints of a whole model in their authors' layout, whose components are found by tensor names."""

from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from sglang_gen.errors import UserError
from sglang_gen.families import registry, text_encoders
from sglang_gen.hub.plain_numbers import require_plain
from sglang_gen.hub.safetensors_header import Header, read_header, refuse_other_formats
from sglang_gen.types import TEXT_ENCODERS, Component

NETWORKS = ("unet", "transformer")
INSIDE = "model.diffusion_model."  # prefix of the denoising network in a checkpoint of the whole model
VAE_PREFIXES = ("first_stage_model.", "vae.")
BARE = ("double_blocks.", "joint_blocks.", "blocks.", "transformer_blocks.", "down_blocks.", "input_blocks.")
# Training state, which is not used: averaged weights, the noise schedule (which the scheduler computes), the loss.
TRAINING = (
    "model_ema.", "betas", "alphas_", "sqrt_", "log_one_minus_", "posterior_", "logvar", "lvlb_weights", "denoiser.",
    "loss.", "callbacks.", "optimizer",
)  # fmt: skip
MARKERS = ("v_pred", "ztsnr", "edm_")  # markers of the prediction type, read by `prediction_markers`


def read(path: Path) -> Header:
    """Read the header of a checkpoint of a whole model. Raises UserError for any other file."""
    if path.suffix.lower() == ".gguf":
        raise UserError(f"--model-path: {path} holds only a quantized network; {_whole_model(path)}")
    refuse_other_formats(path, "--model-path")
    header = read_header(path)
    shapes = header.tensors
    if any(".lora" in name or name.startswith("lora_") for name in shapes):
        raise UserError(
            f"--model-path: {path} is a LoRA adapter; give it with --lora-path and the model with --model-path"
        )
    if not _network(shapes):
        raise UserError(f"--model-path: {path} holds no denoising network, so it is not a whole model")
    if not _any(shapes, _others()):
        raise UserError(f"--model-path: {path} holds only a denoising network; {_whole_model(path)}")
    require_plain(path, header)
    return header


def _others() -> tuple[str, ...]:
    """Prefixes of all components but the denoising network."""
    encoders = [registry.file_prefixes(name) for name in TEXT_ENCODERS]
    return (*VAE_PREFIXES, *chain(*text_encoders.FILE_PREFIXES.values(), *encoders))


def _whole_model(path: Path) -> str:
    return f"give the whole model with --model-path, and this file with --transformer-weights-path {path}"


def _any(names: Collection[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _network(names: Collection[str]) -> bool:
    return _any(names, (INSIDE, *BARE))


def check_whole(
    path: Path, names: Collection[str], components: Mapping[str, Component], replaced: Collection[str]
) -> None:
    """Raises UserError for a checkpoint without the tensors of a component that is not in `replaced`."""
    for component_name, component in components.items():
        prefixes = _prefixes(component_name, component)
        if prefixes is None or component_name in replaced or _any(names, prefixes):
            continue
        raise UserError(
            f"--model-path: {path} holds no {component_name} ({component.class_name}); "
            f"""give it with --component-paths '{{"{component_name}": "FOLDER"}}'"""
        )


def _prefixes(component_name: str, component: Component) -> tuple[str, ...] | None:
    """Prefixes of a component's tensors in the file; None for a component that is never in it, such as a tokenizer."""
    if component_name in NETWORKS:
        return (INSIDE, *BARE)
    if component_name == "vae":
        return VAE_PREFIXES
    if component.class_name in text_encoders.FILE_PREFIXES:
        return text_encoders.FILE_PREFIXES[component.class_name]
    if component_name.startswith("text_encoder"):
        return registry.file_prefixes(component_name) or ("text_encoders.",)
    return None


def of_component(names: Collection[str], component_name: str) -> set[str]:
    """The tensor names of a checkpoint that belong to its denoising network or its autoencoder."""
    if component_name == "vae":
        return {name for name in names if name.startswith(VAE_PREFIXES)}
    inside = {name for name in names if name.startswith(INSIDE)}
    others = (*_others(), *TRAINING)
    return inside or {name for name in names if not name.startswith(others)}


def of_text_encoder(names: Collection[str], component_name: str, component: Component) -> dict[str, str]:
    """Map transformers' tensor names of a text encoder to the names in a checkpoint.

    Empty for the layout with `resblocks`, from which some models omit the last layer on purpose.
    """
    mapping: dict[str, str] = {}
    for prefix in _prefixes(component_name, component) or ():
        inside = f"{prefix.removesuffix('transformer.')}transformer."
        theirs = {name.removeprefix(inside): name for name in names if name.startswith(inside)}
        if not any(name.startswith("resblocks.") for name in theirs):
            mapping |= theirs
    return {name.removeprefix("text_model."): full for name, full in mapping.items()}


def unclaimed(names: Collection[str], components: Mapping[str, Component]) -> list[str]:
    """Names of tensors that belong to no component and are not training state."""
    if not any(name.startswith(INSIDE) for name in names):
        return []
    known = [_prefixes(component_name, component) or () for component_name, component in components.items()]
    prefixes = (*(prefix for group in known for prefix in group), *TRAINING, *MARKERS)
    return sorted(name for name in names if not name.startswith(prefixes))


def source_of_configs(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The hub id with matching component configs, which diffusers infers from names and shapes. Raises UserError."""
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, fetch_diffusers_config

    failures = (KeyError, IndexError, TypeError, ValueError, AttributeError, UnboundLocalError)
    try:
        inferred = fetch_diffusers_config({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
    except failures:  # names that diffusers' rules do not expect
        inferred = None
    if inferred is None or (inferred == fetch_diffusers_config({}) and CHECKPOINT_KEY_NAMES["v1"] not in shapes):
        raise UserError(
            f"--model-path: {path} is of an unknown model; name the preset with --model-id (sglang models lists "
            "them), or give a folder or hub id that has its component configs with model.configs=FOLDER"
        )
    return str(inferred["pretrained_model_name_or_path"])
