"""Detects custom code in a model repository from its config files; it runs only with the user's permission."""

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sglang_gen.config.schema import Model
from sglang_gen.errors import UserError
from sglang_gen.hub.component_folder import read_json
from sglang_gen.types import Component, ModelCard

SOURCE_NAMES = {"file": "configuration file", "group": "group option"}  # source of a value -> its name in messages
CONFIGS_WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
LIBRARIES = ("diffusers", "transformers", "onnxruntime")


def files(folder: Path, pipeline: Any, components: Mapping[str, Component]) -> tuple[str, ...]:
    """Files of the repository that the pipeline would execute: its own class and custom components.

    `pipeline` is the entry `_class_name`: a class of diffusers, or a list of a file and a class. A component's library
    is a Python file beside its weights, unless it is in `LIBRARIES` or a module of diffusers. Only names are read, so
    the files need not be downloaded.
    """
    code = [f"{pipeline[0]}.py"] if isinstance(pipeline, list) and len(pipeline) > 1 else []
    for name, component in components.items():
        beside = folder / name / f"{component.library}.py"
        if beside.is_file() or not _is_library(component.library):
            code.append(f"{name}/{component.library}.py")
        code += in_component(name, component)
    return tuple(code)


def in_component(name: str, component: Component) -> list[str]:
    """Code named in a component's configuration: hub kernels, custom classes (`auto_map`), a pipeline's own file."""
    code = [f"{name}/config.json, the kernel {kernel}" for kernel in _kernels(component.config)]
    if component.class_name.startswith("Auto"):  # only the Auto classes read `auto_map`
        for file in CONFIGS_WITH_CODE:
            path = component.folder / file if component.folder else None
            if path and path.is_file() and "auto_map" in read_json(path):
                code.append(f"{name}/{file}, auto_map")
    index = component.folder / "model_index.json" if component.folder else None
    if index and index.is_file() and isinstance(read_json(index).get("_class_name"), list):
        code.append(f"{name}/model_index.json")
    return code


def _kernels(config: Mapping[str, Any]) -> list[str]:
    """Hub ids of attention kernels that transformers would download and import, at any depth of the config."""
    kernels = []
    for key, value in config.items():
        if key.strip("_").startswith("attn_implementation"):
            names = value.values() if isinstance(value, dict) else [value]
            kernels += [name for name in names if isinstance(name, str) and "/" in name]
        elif isinstance(value, dict):
            kernels += _kernels(value)
    return kernels


def _is_library(name: str) -> bool:
    return name.split(".")[0] in LIBRARIES or name in _pipeline_modules()


@cache
def _pipeline_modules() -> frozenset[str]:
    """Modules of diffusers.pipelines, which model_index.json may name as a library. Does not import diffusers."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    pipelines = Path(spec.origin).parent / "pipelines"
    return frozenset(path.stem for path in pipelines.iterdir() if path.is_dir() or path.suffix == ".py")


def check_trusted(card: ModelCard, trusted: bool) -> None:
    """Raises UserError for a model that runs custom code without --trust-remote-code."""
    if card.code and not trusted:
        raise UserError(refusal(card.name, ", ".join(card.code)))


def check_component(path: str, name: str, component: Component, trusted: bool) -> None:
    """`check_trusted` for a component given with --component-paths."""
    code = in_component(name, component)
    if code and not trusted:
        raise UserError(f"--component-paths: {refusal(path, ', '.join(code))}")


def refusal(name: str, what: str) -> str:
    return f"{name} runs code from its repository ({what}): read it, then allow it with --trust-remote-code"


def warnings(model: Model, card: ModelCard, sources: Mapping[str, str]) -> list[str]:
    """Warnings about --trust-remote-code without effect, and about code that a configuration file allows to run."""
    if model.trust_remote_code and not card.code:
        return [f"--trust-remote-code has no effect: {card.name} contains no Python code"]
    return _running(card, f"model.trust_remote_code of the {where}") if (where := _file(model, sources)) else []


def notices(model: Model, card: ModelCard, sources: Mapping[str, str]) -> list[str]:
    """A notice about code that the command line allows to run."""
    return _running(card, "--trust-remote-code") if model.trust_remote_code and not _file(model, sources) else []


def _running(card: ModelCard, allowed: str) -> list[str]:
    return [f"{card.name} runs code from its repository ({', '.join(card.code)}), allowed by {allowed}"] * bool(
        card.code
    )


def _file(model: Model, sources: Mapping[str, str]) -> str | None:
    """The kind of file that sets trust_remote_code; None if the command line does or nothing does."""
    source = sources.get("model.trust_remote_code", "default")
    return SOURCE_NAMES.get(source, source) if model.trust_remote_code and source not in ("flag", "override") else None


def pipeline_class(card: ModelCard) -> Any:
    """Import the pipeline class that the repository defines, which runs its code. None if the class is diffusers'."""
    if not card.code or "/" in card.code[0]:
        return None
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    assert card.folder is not None  # a model with weights
    return get_class_from_dynamic_module(
        str(card.folder), module_file=card.code[0], class_name=card.pipeline_class, trust_remote_code=True
    )
