"""Reads the configuration of a component's folder and checks that its files are complete, without loading weights."""

import json
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError, in_our_words
from sglang_gen.hub.config_limits import check_sizes
from sglang_gen.hub.plain_numbers import require_plain
from sglang_gen.hub.safetensors_header import PICKLED, PICKLES, is_pointer, read_header
from sglang_gen.types import Component

INDEX = ".safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT; transformers loads the adapter beside it automatically


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises UserError if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {in_our_words(error)}") from error
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The component's configuration; empty if it has none, like a tokenizer. Raises UserError for an invalid file."""
    for name in ("config.json", "scheduler_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            check_sizes(folder / name, config)
            return config
    return {}


def in_folder(folder: Path) -> list[Path]:
    """The weight files that the component's library would load, all of them safetensors files in `folder`.

    diffusers prefers an index to a single file. transformers prefers the single file, unless the configuration names a
    file (`transformers_weights`). If the usual names are absent, a file without a variant is used. Raises UserError
    for an index that cannot be read or that names files of another format.
    """
    config = read_config(folder)
    is_diffusers = "_class_name" in config
    named = None if is_diffusers else config.get("transformers_weights")
    if named is not None:
        return indexed(folder, folder / str(named), f"{folder / 'config.json'} (transformers_weights)")
    stem = "diffusion_pytorch_model" if is_diffusers else "model"
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    usual = [index, single] if is_diffusers else [single, index]
    paths = [path for path in usual if path.is_file()] or [*_without_variant(folder, "*.safetensors.index.json")]
    paths = paths or [*_without_variant(folder, "*.safetensors")]
    return indexed(folder, paths[0], str(folder)) if paths else []


def _without_variant(folder: Path, pattern: str) -> list[Path]:
    """The matching file with the fewest dots in its name (variants add one: model.fp16.safetensors), if any."""
    return sorted(folder.glob(pattern), key=lambda path: (path.name.count("."), path.name))[:1]


def indexed(folder: Path, path: Path, named_by: str) -> list[Path]:
    """The safetensors file `path`, or the files listed in the index `path`. Raises UserError for any other file."""
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
    """Raises UserError for a component whose files are missing, pickled, truncated or corrupt.

    Only the headers of weight files are read.
    """
    if (folder / ADAPTER).is_file():  # transformers would load the adapter, and the base model that it names
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}), which its library would load automatically; remove it from the "
            "model's folder and give it with --lora-path"
        )
    weights = any(path.suffix.lower() in (".safetensors", *PICKLES) for path in folder.iterdir())
    names = {"_class_name", "architectures"}
    if (folder / "config.json").is_file() and (weights or not names.isdisjoint(component.config)):
        check_weights(folder, component)
    check_vocabulary(folder, component)


def check_weights(folder: Path, component: Component) -> None:
    """Raises UserError for weights that are missing, pickled, corrupt or quantized without a declaration.

    Only headers are read.
    """
    files = in_folder(folder)
    if not files:
        pickled = any(path.suffix.lower() in PICKLES for path in folder.iterdir())
        raise UserError(f"{folder} {PICKLED if pickled else 'holds no weights (*.safetensors)'}")
    if all("." in path.stem for path in files):
        raise UserError(
            f"{folder} holds only variants of its weights ({files[0].name}): rename the files to use to names without "
            f"a variant, such as {files[0].name.partition('.')[0]}.safetensors"
        )
    for path in files:
        if not path.is_file():
            raise UserError(f"{folder} lacks the weight file {path.name}")
    headers = [(path, read_header(path)) for path in files]
    if "quantization_config" not in component.config:  # a declared quantization is handled by the library
        for path, header in headers:
            require_plain(path, header)


def check_vocabulary(folder: Path, component: Component) -> None:
    """Raises UserError for a tokenizer without a vocabulary, which would load and encode every prompt alike.

    Also for files that were not downloaded.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer: run 'git lfs pull'")
    if not has_vocabulary(folder, component):
        raise UserError(f"{folder} holds no vocabulary for {component.class_name}")


def has_vocabulary(folder: Path, component: Component) -> bool:
    """Whether the folder exists and, of a tokenizer that has a vocabulary, holds one."""
    if not folder.is_dir():
        return False
    if "Tokenizer" not in component.class_name or "ByT5" in component.class_name:
        return True
    settings = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"}
    return not settings.issuperset(path.name for path in folder.iterdir())
