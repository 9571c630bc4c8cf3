"""Finds LoRA files in a folder or on the hub, reads them, and refuses other kinds of adapters by name."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_gen import env, log
from sglang_gen.errors import UserError
from sglang_gen.hub import download
from sglang_gen.hub.plain_numbers import quantized
from sglang_gen.hub.safetensors_header import PICKLED, PICKLES, read_header, refuse_other_formats
from sglang_gen.weights.lora import settings as lora_settings
from sglang_gen.weights.lora.settings import ADVICE

USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # default names of diffusers and PEFT
SETTINGS_FILE = "adapter_config.json"
FACTOR = re.compile(r"^(?P<module>.+)\.(?P<side>lora_A|lora_B|lora_down|lora_up|down|up)(\.default)?\.weight$")
DOWN = ("lora_A", "lora_down", "down")

KOHYA_JOINT_BLOCKS = re.compile(r"lora_[a-z]+_(joint_blocks|context_embedder)_")
# Substrings of tensor names -> the kind of adapter they belong to.
OTHER_KINDS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT",
    "on_input": "IA3", "lora_mid": "LoCon with a Tucker core", "lora_embedding": "LoRA of an embedding",
    "emb_params": "textual inversion",
}  # fmt: skip


@dataclass
class Factors:
    """The factors of one module: `scale * up @ down` is added to its weight; `scale` is alpha / rank."""

    down: torch.Tensor  # [rank, in], or a convolution's kernel [rank, in, h, w]
    up: torch.Tensor  # [out, rank]
    down_key: str
    up_key: str
    scale: float = 1.0


@dataclass(frozen=True)
class Keys:
    """Names of one module's tensors in the file, and its rank."""

    down: str
    up: str
    alpha: str | None
    rank: int


@dataclass(frozen=True)
class LoraFile:
    """An adapter; `modules` are keyed by the module names in the file."""

    path: Path
    modules: Mapping[str, Factors]


def check_local_file(name: str) -> None:
    """Check names, shapes and settings of a local adapter before any weight is read. Raises UserError."""
    if local := find(name):
        _inspect(name, *local)


def read(name: str) -> LoraFile:
    """Read the adapter of a file, folder or hub id. Raises UserError if it is not a plain LoRA."""
    path, config = find(name) or _download(name)
    modules, scales = _inspect(name, path, config)
    from safetensors.torch import load_file

    weights = load_file(path)
    factors = {}
    for module, keys in modules.items():
        down, up = weights[keys.down].float(), weights[keys.up].float()
        scale = scales[module]
        if keys.alpha:
            scale = _own_alpha(name, keys.alpha, weights[keys.alpha]) / keys.rank
        factors[module] = Factors(down, up, keys.down, keys.up, scale)
    return LoraFile(path, factors)


def _inspect(name: str, path: Path, config: Path | None) -> tuple[dict[str, Keys], dict[str, float]]:
    """The file's modules, and each module's scale from the settings; a tensor `.alpha` in the file overrides it."""
    header = read_header(path)
    shapes = {key: tensor.shape for key, tensor in header.tensors.items()}
    if kind := quantized(header):
        raise UserError(f"lora: {name} holds quantized factors ({kind}), which are not supported")
    settings = lora_settings.load(name, path, config)
    _refuse_other_kinds(name, shapes)
    modules = _pairs(name, shapes)
    lora_settings.warn_of_unused(settings, modules)
    return modules, {module: settings.scale(module, keys.rank) for module, keys in modules.items()}


def find(name: str) -> tuple[Path, Path | None] | None:
    """The local weight file and its adapter_config.json, if there is one; None for a hub id.

    Raises UserError for a name that is neither a file nor a folder and cannot be a hub id.
    """
    path = Path(name).expanduser()
    if path.is_file():
        refuse_other_formats(path, "lora")
        return path, _beside(path.parent / SETTINGS_FILE) if path.name in USUAL else None
    if path.is_dir():
        chosen = _choose(name, [file.name for file in path.iterdir()])
        return path / chosen, _beside(path / SETTINGS_FILE)
    inside = Path(*path.parts[2:])
    if name.startswith(("/", ".", "~")) or len(path.parts) == 1:
        raise UserError(f"lora: {name} does not exist")
    if not inside.suffix if inside.parts else path.suffix == ".safetensors":
        raise UserError(
            f"lora: {name} does not exist, nor is it an adapter of the hub (owner/name, or owner/name/file.safetensors)"
        )
    return None


def _beside(path: Path) -> Path | None:
    return path if path.is_file() else None


def _choose(name: str, files: Iterable[str]) -> str:
    """The weight file of a folder: the only one, or the one with the usual name."""
    files = sorted(files)
    weights = [file for file in files if file.endswith(".safetensors")]
    usual = [file for file in weights if file in USUAL]
    if not weights:
        pickled = any(file.endswith(PICKLES) for file in files)
        raise UserError(f"lora: {name} {PICKLED if pickled else 'holds no weights (*.safetensors)'}")
    if len(weights) > 1 and len(usual) != 1:
        raise UserError(
            f"lora: {name} holds {len(weights)} weight files "
            f"({', '.join(weights[:3])}{', ...' if weights[3:] else ''}); name one of them: "
            f"{name.rstrip('/')}/{weights[0]}"
        )
    return weights[0] if len(weights) == 1 else usual[0]


def _download(name: str) -> tuple[Path, Path | None]:
    """Download `owner/name`, or `owner/name/file.safetensors` if a repository holds several files, from the hub."""
    from huggingface_hub import errors

    repo, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if env.use_modelscope():
        raise UserError(f"lora: {name} is not a file or folder, and adapters are not read from ModelScope; give a file")
    if inside:
        refuse_other_formats(Path(inside), "lora")
    try:
        files, get = _repository(repo)
        chosen = inside or _choose(name, files)
        if chosen not in files:
            raise UserError(f"lora: {repo} on the hub has no file {chosen}")
        return get(chosen), get(SETTINGS_FILE) if SETTINGS_FILE in files else None
    except UserError:
        raise
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise download.hub_error(error, repo, None) from error


def _repository(repo: str) -> tuple[list[str], Callable[[str], Path]]:
    """File names of a repository and a function to get one; from the local cache if the hub cannot be reached."""
    from huggingface_hub import errors, hf_hub_download, model_info, snapshot_download

    try:
        files = [sibling.rfilename for sibling in model_info(repo).siblings or []]
    except errors.HfHubHTTPError:
        raise
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        try:
            folder = Path(snapshot_download(repo, local_files_only=True))
        except OSError:
            raise error from None
        log.warning(f"The hub cannot be reached: using the copy of {repo} in the local cache")
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*")], folder.joinpath
    return files, lambda file: Path(hf_hub_download(repo, file))


def _refuse_other_kinds(name: str, tensors: Iterable[str]) -> None:
    for key in tensors:
        if KOHYA_JOINT_BLOCKS.match(key):
            raise UserError(
                f"lora: {name} has the names that kohya's scripts give to networks of joint blocks ({key}), which are "
                "not mapped to the model's; convert it to diffusers' or PEFT's names"
            )
        for mark, kind in OTHER_KINDS.items():
            if mark in key:
                raise UserError(f"lora: {name} is an adapter of the kind {kind} ({key}), and only LoRA is applied")
        if key.endswith(".bias"):
            raise UserError(f"lora: {name} holds {key}, a bias, and only factors are merged; {ADVICE}")


def _pairs(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Keys]:
    """Both factors and the alpha of every module. Raises UserError for any other tensor in the file."""
    sides: dict[str, dict[bool, str]] = {}
    alphas = {}
    for key, shape in shapes.items():
        factor = FACTOR.match(key)
        if key.endswith(".alpha") and math.prod(shape) == 1:
            alphas[key.removesuffix(".alpha")] = key
        elif factor and (factor["side"].startswith("lora") or "lora" in factor["module"]):
            sides.setdefault(factor["module"], {})[factor["side"] in DOWN] = key
        else:
            raise UserError(f"lora: {name} holds {key}, which is neither a factor of a LoRA nor its alpha")
    if not sides:
        raise UserError(f"lora: {name} holds no LoRA factors")
    modules = {}
    for module, keys in sides.items():
        if len(keys) < 2:
            raise UserError(f"lora: {name} holds only one factor of {module}")
        down, up = shapes[keys[True]], shapes[keys[False]]
        if len(down) < 2 or len(up) < 2 or down[0] != up[1] or down[0] == 0:
            raise UserError(f"lora: the factors of {module} in {name} do not match: {[*up]} and {[*down]}")
        alpha = alphas.get(_alpha_name(module), alphas.get(module))
        modules[module] = Keys(keys[True], keys[False], alpha, down[0])
    if orphans := set(alphas) - {_alpha_name(module) for module in modules} - set(modules):
        raise UserError(f"lora: {name} holds an alpha of {sorted(orphans)[0]} without its factors")
    return modules


def _alpha_name(module: str) -> str:
    return module.removesuffix(".lora").removesuffix("_lora")


def _own_alpha(name: str, key: str, alpha: torch.Tensor) -> float:
    value = float(alpha)
    if not math.isfinite(value):
        raise UserError(f"lora: {name} holds the alpha {value} as {key}; it must be a finite number")
    return value
