"""The folder of one component before anything is loaded: its configuration, and whether its files are whole."""

import json
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError, first_line
from sglang_gen.safetensors_file import PICKLED, PICKLES, header
from sglang_gen.types import Component


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


def check_files(folder: Path, component: Component) -> None:
    """Refuse a component whose files are missing, pickled, truncated or corrupt before anything is loaded.

    Of weights only headers are read. Raises UserError.
    """
    for shard in _shards(folder):
        if not (folder / shard).is_file():
            raise UserError(f"{folder} lacks the weight file {shard}")
    files = sorted(folder.glob("*.safetensors"))
    is_network = (folder / "config.json").is_file() and not {"_class_name", "architectures"}.isdisjoint(
        component.config
    )
    if is_network and files and all("." in path.stem for path in files):
        raise UserError(
            f"{folder} holds variants of its weights alone ({files[0].name}): rename those to take, to "
            f"{files[0].name.partition('.')[0]}.safetensors and the like"
        )
    if not files and any(path.suffix.lower() in PICKLES for path in folder.iterdir()):  # whatever its config says
        raise UserError(f"{folder} {PICKLED}")
    if is_network and not files:
        raise UserError(f"{folder} holds no weights (*.safetensors)")
    check_vocabulary(folder, component)
    for path in files:
        header(path)


def check_vocabulary(folder: Path, component: Component) -> None:
    """Raises UserError for a tokenizer without vocabulary, which would load, and make every prompt the same."""
    if "Tokenizer" in component.class_name and "ByT5" not in component.class_name:
        settings = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"}
        if settings.issuperset(path.name for path in folder.iterdir()):
            raise UserError(f"{folder} holds no vocabulary for {component.class_name}")


def _shards(folder: Path) -> list[str]:
    """Names of the files that the weights of a folder are spread over, from its index."""
    indices = (folder / f"{stem}.safetensors.index.json" for stem in ("diffusion_pytorch_model", "model"))
    maps = [read_json(index).get("weight_map") for index in indices if index.is_file()]
    return sorted({str(shard) for shards in maps if isinstance(shards, dict) for shard in shards.values()})
