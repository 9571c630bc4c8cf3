"""The files of --transformer-weights-path: their paths, their headers, and the quantization that they declare.

This module reads no weights and does not import torch.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_gen.errors import UserError
from sglang_gen.hub.component_folder import indexed, read_json
from sglang_gen.hub.safetensors_header import PICKLES, Header, Tensor, read_header

FLAG = "--transformer-weights-path"
FORMATS = (".safetensors", ".gguf")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names, torch's names


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of one network. `config` is the content of the config.json in their folder, if there is one."""

    given: str
    paths: tuple[Path, ...]
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return self.paths[0].suffix.lower() == ".gguf"


def locate(path: str) -> WeightFiles:
    """Find the weight files at a path. Raises UserError if there are none, or some are missing or pickled."""
    place = Path(path).expanduser()
    try:
        is_folder, is_file = place.is_dir(), place.is_file()
    except OSError as error:
        raise UserError(f"{FLAG}: {path}: {error.strerror}") from None
    if is_folder:
        return _in_folder(path, place)
    if not is_file:
        raise UserError(f"{FLAG}: {path} does not exist; it takes a local safetensors or GGUF file, or a folder")
    if place.suffix.lower() in PICKLES:
        raise UserError(f"{FLAG}: {path} is pickled, and pickled weights are refused; give safetensors or GGUF")
    if place.suffix.lower() not in FORMATS:
        raise UserError(f"{FLAG}: {path} is neither a .safetensors nor a .gguf file")
    return WeightFiles(path, (place,))


def _in_folder(given: str, folder: Path) -> WeightFiles:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise UserError(f"{FLAG}: {given} has {len(indices)} indices ({_few(indices)}); keep one")
    if indices:
        shards = indexed(folder, indices[0], str(indices[0]))
        absent = [shard for shard in shards if not shard.is_file()]
        if absent:
            raise UserError(f"{FLAG}: {given} lacks {len(absent)} of its {len(shards)} weight files ({_few(absent)})")
        return WeightFiles(given, tuple(shards), folder, config)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in FORMATS)
    if not files:
        pickled = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICKLES]
        raise UserError(
            f"{FLAG}: {given} holds only pickled weights ({_few(pickled)}), which are refused"
            if pickled
            else f"{FLAG}: {given} holds no weights (*.safetensors, *.gguf)"
        )
    if len(files) > 1:
        raise UserError(f"{FLAG}: {given} holds {len(files)} weight files and no index ({_few(files)}); name one")
    return WeightFiles(given, tuple(files), folder, config)


def _few(paths: Iterable[Path]) -> str:
    return few([path.name for path in paths])


def few(names: Iterable[str], most: int = 3) -> str:
    """The first `most` names, joined by commas: `a, b, c, ...`."""
    listed = list(names)
    return ", ".join([*listed[:most], *(["..."] if len(listed) > most else [])])


def read_headers(paths: Iterable[Path]) -> Header:
    """Merge the headers of several safetensors files.

    Raises UserError for a corrupt file, or for a tensor that occurs in two files.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = read_header(path)
        if twice := tensors.keys() & header.tensors.keys():
            raise UserError(f"{path} holds the tensor {min(twice)}, which another file holds too")
        tensors |= header.tensors
        metadata |= header.metadata
    return Header(tensors, metadata)


def declared(config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The quantization declared in a config.json or in a file's metadata; None without a declaration."""
    declaration = config.get("quantization_config")
    if isinstance(declaration, dict):
        return {"method": _method(declaration), **declaration}
    try:
        declaration = json.loads(metadata.get("quantization_config", "null"))
    except ValueError:
        raise UserError("The quantization_config in the metadata of the weights is not valid JSON") from None
    return {"method": _method(declaration), **declaration} if isinstance(declaration, dict) else None


def _method(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_method") or config.get("method") or "an unnamed method")


def stored_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The dtype in which most numbers are stored, by safetensors' name."""
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += tensor.numbers
    return numbers.most_common(1)[0][0]
