"""The folder of one component before anything is loaded: its configuration, and whether its files are whole."""

import json
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError, first_line
from sglang_gen.hub.plain_numbers import require_plain
from sglang_gen.hub.safetensors_header import PICKLED, PICKLES, read_header
from sglang_gen.types import Component

INDEX = ".safetensors.index.json"
ADAPTER = "adapter_config.json"  # PEFT's; transformers loads the adapter beside it unasked


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The component's configuration; empty where it has none, as a tokenizer. Raises UserError for a broken one."""
    for name in ("config.json", "scheduler_config.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def in_folder(folder: Path) -> list[Path]:
    """The weight files of a component that a loader opens, all of them safetensors files in `folder`.

    diffusers prefers an index to a single file, transformers the single file, unless the configuration names one
    (`transformers_weights`). Where neither finds its usual name, the plainest file of the folder is taken. Raises
    UserError for an index that cannot be read, or that names another kind of file.
    """
    config = read_config(folder)
    is_diffusers = "_class_name" in config
    named = None if is_diffusers else config.get("transformers_weights")
    if named is not None:
        return indexed(folder, folder / str(named), f"{folder / 'config.json'} (transformers_weights)")
    stem = "diffusion_pytorch_model" if is_diffusers else "model"
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    usual = [index, single] if is_diffusers else [single, index]
    found = [path for path in usual if path.is_file()] or [*_plainest(folder, "*.safetensors.index.json")]
    found = found or [*_plainest(folder, "*.safetensors")]
    return indexed(folder, found[0], str(folder)) if found else []


def _plainest(folder: Path, pattern: str) -> list[Path]:
    """The file without a variant in its name, if there is one."""
    return sorted(folder.glob(pattern), key=lambda path: (path.name.count("."), path.name))[:1]


def indexed(folder: Path, path: Path, named_by: str) -> list[Path]:
    """The safetensors file `path`, or those of the index `path`. Raises UserError for any other file."""
    if path.name.endswith(INDEX):
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path} has no weight_map")
        names, named_by = sorted({str(name) for name in weight_map.values()}), str(path)
    else:
        names = [path.name] if path.parent == folder else [str(path)]
    for name in names:
        if not name.endswith(".safetensors"):
            raise UserError(
                f"{named_by} names the weight file {name}, and only safetensors files are read (*.safetensors)"
            )
        if Path(name).name != name:
            raise UserError(f"{named_by} names the weight file {name}, which is not in {folder}")
    return [folder / name for name in names]


def check_files(folder: Path, component: Component) -> None:
    """Refuse a component whose files are missing, pickled, truncated or corrupt before anything is loaded.

    Of weights only headers are read. Raises UserError.
    """
    if (folder / ADAPTER).is_file():  # its library would follow that to other weights, config.json or none
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}), which its library would load by itself; remove it from the "
            "model's folder and name it with --lora-path"
        )
    weights = any(path.suffix.lower() in (".safetensors", *PICKLES) for path in folder.iterdir())
    names = {"_class_name", "architectures"}
    if (folder / "config.json").is_file() and (weights or not names.isdisjoint(component.config)):
        check_weights(folder, component)
    check_vocabulary(folder, component)


def check_weights(folder: Path, component: Component) -> None:
    """Refuse weights that no loader could read as they are meant. Only headers are read. Raises UserError."""
    files = in_folder(folder)
    if not files:
        pickled = any(path.suffix.lower() in PICKLES for path in folder.iterdir())
        raise UserError(f"{folder} {PICKLED if pickled else 'holds no weights (*.safetensors)'}")
    if all("." in path.stem for path in files):
        raise UserError(
            f"{folder} holds variants of its weights alone ({files[0].name}): rename those to take, to "
            f"{files[0].name.partition('.')[0]}.safetensors and the like"
        )
    for path in files:
        if not path.is_file():
            raise UserError(f"{folder} lacks the weight file {path.name}")
    headers = [(path, read_header(path)) for path in files]
    if "quantization_config" not in component.config:  # its library reads what the configuration declares
        for path, found in headers:
            require_plain(path, found)


def check_vocabulary(folder: Path, component: Component) -> None:
    """Raises UserError for a tokenizer without vocabulary, which would load, and make every prompt the same."""
    if "Tokenizer" in component.class_name and "ByT5" not in component.class_name:
        settings = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"}
        if settings.issuperset(path.name for path in folder.iterdir()):
            raise UserError(f"{folder} holds no vocabulary for {component.class_name}")
