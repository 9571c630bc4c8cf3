"""The files of --transformer-weights-path: which there are, what their headers say, what quantization they declare.

Nothing here reads a weight, and nothing here needs torch.
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
    """The weights of one network. `config` is the config.json beside them, where they stand in a folder with one."""

    given: str
    paths: tuple[Path, ...]
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return self.paths[0].suffix.lower() == ".gguf"


def locate(path: str) -> WeightFiles:
    """The weight files of a file or a folder. Raises UserError when there are none, or some are missing or pickled."""
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
            f"{FLAG}: {given} holds pickled weights alone ({_few(pickled)}), and those are refused"
            if pickled
            else f"{FLAG}: {given} holds no weights (*.safetensors, *.gguf)"
        )
    if len(files) > 1:
        raise UserError(f"{FLAG}: {given} holds {len(files)} weight files and no index ({_few(files)}); name one")
    return WeightFiles(given, tuple(files), folder, config)


def _few(paths: Iterable[Path]) -> str:
    return few([path.name for path in paths])


def few(names: Iterable[str], most: int = 3) -> str:
    """The first names of many, in order: `a, b, c, ...`."""
    listed = list(names)
    return ", ".join([*listed[:most], *(["..."] if len(listed) > most else [])])


def read_headers(paths: Iterable[Path]) -> Header:
    """The headers of several safetensors files as one.

    Raises UserError for a file that is corrupt, or a tensor that two of them hold.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = read_header(path)
        if twice := tensors.keys() & header.tensors.keys():
            raise UserError(f"{path} holds the tensor {min(twice)}, which another of the files holds too")
        tensors |= header.tensors
        metadata |= header.metadata
    return Header(tensors, metadata)


def declared(config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The quantization that a config.json or the metadata of a file declares; None without one."""
    found = config.get("quantization_config")
    if isinstance(found, dict):
        return {"method": _method(found), **found}
    try:
        found = json.loads(metadata.get("quantization_config", "null"))
    except ValueError:
        raise UserError("The quantization_config in the metadata of the weights is no JSON") from None
    return {"method": _method(found), **found} if isinstance(found, dict) else None


def _method(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_method") or config.get("method") or "an unnamed method")


def stored_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The dtype, in safetensors' words, that most of the numbers are stored in."""
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += tensor.numbers
    return numbers.most_common(1)[0][0]
