"""--transformer-weights-path: the model's denoising network with the weights of another file or folder.

Names and shapes are compared on the meta device before a weight is read, in diffusers' layout or, if diffusers can
convert it, in the original project's. Loading is done by diffusers.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from sglang_gen import log
from sglang_gen.config.schema import QuantMethod
from sglang_gen.errors import LOADING_ERRORS, UserError, in_our_words
from sglang_gen.families import registry
from sglang_gen.hub import component_classes, weight_files
from sglang_gen.hub.plain_numbers import quantized
from sglang_gen.hub.safetensors_header import Header, Tensor
from sglang_gen.hub.single_file import INSIDE
from sglang_gen.hub.weight_files import FLAG, WeightFiles, few
from sglang_gen.plan import quantization
from sglang_gen.types import Component, Plan
from sglang_gen.weights import gguf, nunchaku, original_layout
from sglang_gen.weights.original_layout import CONVERSION_ERRORS

# Quantization methods that diffusers reads from a folder whose config.json declares them -> required packages.
METHODS = {
    "torchao": "torchao", "bitsandbytes": "bitsandbytes", "quanto": "optimum-quanto", "modelopt": "nvidia-modelopt",
    "auto-round": "auto-round", "sdnq": "sdnq", "nunchaku_lite": "kernels", "bfl": "kernels",
}  # fmt: skip


def load(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """`{component name: network}` of --transformer-weights-path, on the CPU; empty without the flag.

    Raises UserError for files that are corrupt, quantized in an unsupported way, or of another network.
    """
    path = plan.run.quant.transformer_weights_path
    if path is None:
        return {}
    (name,) = quantization.denoisers(plan.card)
    component, files = plan.card.components[name], weight_files.locate(path)
    kind = component_classes.named(component)
    _check_config(kind.__name__, name, plan, files)
    if files.is_gguf:
        return {name: _load_gguf(kind, component, files, dtype)}
    headers = weight_files.read_headers(files.paths)
    declared = weight_files.declared(files.config, headers.metadata)
    if quantization.wants_nunchaku(plan.run) or (declared and declared["method"] == "svdquant"):
        return {name: nunchaku.load(plan, component.class_name, files, headers.metadata, dtype)}
    if declared:
        return {name: _load_declared(kind, files, declared, plan, dtype)}
    _check_plain(headers.tensors, files)
    if plan.run.quant.method is QuantMethod.prequantized:
        raise UserError(
            f"quant=prequantized: the weights in {path} are plain; run with quant=none, or int8 to quantize"
        )
    if is_own_layout(kind, component, headers.tensors, files):
        return {name: _load_own_layout(kind, component, files, headers.tensors, dtype)}
    return {name: load_original(kind, component, files.paths, dtype)}


def in_diffusers_layout(plan: Plan, name: str, files: WeightFiles) -> bool:
    """True if the files are plain weights of network `name` in diffusers' layout, False if in the original layout.

    Raises UserError for any other files. Reads only headers.
    """
    component = plan.card.components[name]
    _check_config(component.class_name, name, plan, files)
    tensors = weight_files.read_headers(files.paths).tensors
    _check_plain(tensors, files)
    if not component_classes.in_diffusers(component.class_name):
        return True  # there is no other layout; the native engine compares names and shapes when it loads
    kind = component_classes.named(component)
    return is_own_layout(kind, component, tensors, files)


def _check_config(kind: str, name: str, plan: Plan, files: WeightFiles) -> None:
    """The model needs a config of its network, and a config.json next to the weights must describe the same network."""
    component = plan.card.components[name]
    if component.folder is None or not (component.folder / "config.json").is_file():
        raise UserError(
            f"{FLAG}: {plan.card.name} has no {name}/config.json, which says what network the weights are of"
        )
    theirs = {key: value for key, value in files.config.items() if key in component.config and not key.startswith("_")}
    other = files.config.get("_class_name")
    if other is not None and other != kind:
        raise UserError(f"{FLAG}: {files.given} holds the class {other}, and the model has the class {kind}")
    differing = [
        key for key, value in theirs.items() if key != "quantization_config" and value != component.config[key]
    ]
    if differing:
        raise UserError(
            f"{FLAG}: {files.given} is a different {kind} than the model's ({few(differing)} differ); "
            "load it with --component-paths"
        )


def _check_plain(tensors: Mapping[str, Tensor], files: WeightFiles) -> None:
    """Refuse types of fewer bits without a declared quantization, because the meaning of their scales is unknown."""
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in weight_files.FLOATS]
    if odd:
        kinds = ", ".join(sorted({tensors[name].dtype for name in odd}))
        raise UserError(
            f"{FLAG}: {files.given} stores {len(odd)} tensors as {kinds} ({few(odd)}) and declares no quantization, so "
            "they cannot be read; give diffusers' folder with its config.json, a GGUF file, or plain weights"
        )
    if kind := quantized(Header(tensors, {})):
        raise UserError(
            f"{FLAG}: {files.given} holds quantized weights ({kind}) and declares no quantization, so they cannot be "
            "read; give diffusers' folder with its config.json, a GGUF file, or plain weights"
        )


def _expected(kind: Any, component: Component) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the model's network."""
    with init_empty_weights():
        network = kind.from_config(_config(component))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _config(component: Component) -> dict[str, Any]:
    """The network's config without the quantization of the model's own weights, which are not loaded."""
    return {key: value for key, value in component.config.items() if key != "quantization_config"}


def is_own_layout(kind: Any, component: Component, tensors: Mapping[str, Tensor], files: WeightFiles) -> bool:
    """True for diffusers' layout, False for the original one. Raises UserError for weights of another network."""
    expected = _expected(kind, component)
    own = len(expected.keys() & tensors.keys()) * 2 >= len(tensors)
    convert = original_layout.conversion([base.__name__ for base in kind.__mro__])
    if own or convert is None:
        _compare(expected, {name: tensor.shape for name, tensor in tensors.items()}, kind, files)
        return True
    meta = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    try:
        converted = convert(_config(component), dict(meta))
    except CONVERSION_ERRORS as error:
        raise UserError(
            f"{FLAG}: the tensors of {files.given} ({few(tensors)}) are neither in diffusers' layout of "
            f"{kind.__name__} nor in the original one"
        ) from error
    _compare(expected, {name: tuple(tensor.shape) for name, tensor in converted.items()}, kind, files)
    _tell_unused(meta, converted, files)
    return False


def _is(kind: Any, name: str) -> bool:
    return issubclass(kind, getattr(diffusers, name))


def _compare(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], kind: Any, files: WeightFiles
) -> None:
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    shapes = [
        f"{name} {list(given[name])} in place of {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    wrong = {"missing": missing, "unexpected": surplus, "of another shape": shapes}
    problems = [f"{len(names)} {what} ({few(names)})" for what, names in wrong.items() if names]
    if problems:
        raise UserError(
            f"{FLAG}: the weights in {files.given} do not match this {kind.__name__}: of {len(expected)} expected and "
            f"{len(given)} given tensors, {'; '.join(problems)}"
        )


def _tell_unused(given: Mapping[str, torch.Tensor], converted: Mapping[str, torch.Tensor], files: WeightFiles) -> None:
    """Log which tensors and how many elements the conversion left out; they belong to something else."""
    inside = {name: tensor for name, tensor in given.items() if name.startswith(INSIDE)} or dict(given)
    if len(inside) < len(given):
        log.info(f"{FLAG}: only the denoising network of {files.given} is read, {len(inside)} of {len(given)} tensors")
    left = sum(t.numel() for t in inside.values()) - sum(t.numel() for t in converted.values())
    if left > 0:
        log.warning(f"{FLAG}: {left} values of {files.given} do not fit the network and are not used")


def _load_own_layout(
    kind: Any, component: Component, files: WeightFiles, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Any:
    """diffusers' `from_pretrained`, from a folder with links to the files and the model's own config."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_config(component, folder)
        stem = "diffusion_pytorch_model"
        if len(files.paths) == 1:
            (folder / f"{stem}.safetensors").symlink_to(files.paths[0].resolve())
        else:
            names = {path: f"{stem}-{index:05d}.safetensors" for index, path in enumerate(files.paths)}
            for path, link in names.items():
                (folder / link).symlink_to(path.resolve())
            places = {key: names[path] for path in files.paths for key in weight_files.read_headers([path]).tensors}
            assert places.keys() == tensors.keys()
            index = {"metadata": {}, "weight_map": places}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return kind.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)


def _write_config(component: Component, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(_config(component)), encoding="utf-8")


def load_original(kind: Any, component: Component, paths: Sequence[Path], dtype: torch.dtype) -> Any:
    """A network of diffusers with weights in the original layout, by our conversion where we have one."""
    if registry.conversion(component.class_name) is None:
        return _load_single_file(kind, component, paths, {"dtype": dtype})
    tensors = original_layout.read(component.class_name, _config(component), paths)
    with init_empty_weights():
        network = kind.from_config(_config(component))
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return network.eval()


def _load_single_file(kind: Any, component: Component, paths: Sequence[Path], settings: dict[str, Any]) -> Any:
    """diffusers' single-file loading, with the model's own configuration so that none is downloaded."""
    from safetensors.torch import load_file

    source: Any = str(paths[0])
    if len(paths) > 1:
        source = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    with tempfile.TemporaryDirectory() as folder:
        _write_config(component, Path(folder))
        return kind.from_single_file(source, config=folder, local_files_only=True, **settings)


def _load_gguf(kind: Any, component: Component, files: WeightFiles, dtype: torch.dtype) -> Any:
    from diffusers import GGUFQuantizationConfig

    (path,) = files.paths
    is_own_layout(kind, component, gguf.read_header(path), files)
    if not any(_is(kind, name) for name in SINGLE_FILE_LOADABLE_CLASSES):
        raise UserError(f"{FLAG}: diffusers reads no GGUF files of {kind.__name__}; give safetensors")
    settings = {"quantization_config": GGUFQuantizationConfig(compute_dtype=dtype), "dtype": dtype}
    network = _load_single_file(kind, component, files.paths, settings)
    gguf.check_places(network, path)
    return network


def _load_declared(kind: Any, files: WeightFiles, declared: Mapping[str, Any], plan: Plan, dtype: torch.dtype) -> Any:
    """Load weights that diffusers quantized and saved, as the config.json next to them declares."""
    method = declared["method"]
    if plan.run.quant.method in quantization.ON_LOAD:
        raise UserError(f"quant={plan.run.quant.method.name}: {files.given} is quantized already, by {method}")
    if files.folder is None or "quantization_config" not in files.config:
        raise UserError(f"{FLAG}: {files.given} is quantized by {method}; give the folder with its config.json")
    if method not in METHODS:
        raise UserError(
            f"{FLAG}: {files.given} is quantized by '{method}', which diffusers {diffusers.__version__} cannot read"
        )
    package = METHODS[method]
    if method in quantization.ON_GPU and plan.device == "cpu":
        raise UserError(f"{FLAG}: {files.given} is quantized by {method}, which diffusers runs on a GPU only")
    try:
        network, told = kind.from_pretrained(
            str(files.folder), dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except ImportError as error:
        raise UserError(
            f"{FLAG}: {files.given} is quantized by {method}, which needs {package}: pip install {package}"
        ) from error
    except LOADING_ERRORS as error:
        raise UserError(
            f"{FLAG}: {files.given}, quantized by {method}, cannot be loaded: {in_our_words(error)}"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, told.get(what) or [])):
            raise UserError(f"{FLAG}: {files.given} has {len(names)} {what.replace('_', ' ')} ({few(names)})")
    return network
