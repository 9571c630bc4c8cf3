"""Code that a model repository carries: seen in its model_index.json, and run only where the user says so."""

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sglang_gen.config.schema import Model
from sglang_gen.errors import UserError
from sglang_gen.hub.component_folder import read_json
from sglang_gen.types import Component, ModelCard

SOURCE_NAMES = {"file": "configuration file", "group": "group option"}  # source of a value -> what it is called here
CONFIGS_WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
LIBRARIES = ("diffusers", "transformers", "onnxruntime")


def files(folder: Path, pipeline: Any, components: Mapping[str, Component]) -> tuple[str, ...]:
    """Files whose code the pipeline would run: that of its own class, and those of components of its own.

    `pipeline` is the entry `_class_name`: a class of diffusers, or a list of a file and a class. What a component
    names as its library is a file beside its weights, unless it is one of the libraries or a module of diffusers. Only
    names are looked at: the files need not be here yet.
    """
    found = [f"{pipeline[0]}.py"] if isinstance(pipeline, list) and len(pipeline) > 1 else []
    for part, component in components.items():
        beside = folder / part / f"{component.library}.py"
        if beside.is_file() or not _is_library(component.library):
            found.append(f"{part}/{component.library}.py")
        found += in_component(part, component)
    return tuple(found)


def in_component(part: str, component: Component) -> list[str]:
    """Code that the configuration of a component names: a kernel of the hub, classes of its own, a pipeline's file."""
    found = [f"{part}/config.json, the kernel {name}" for name in _kernels(component.config)]
    if component.class_name.startswith("Auto"):  # which read `auto_map`; a class of a name does not
        for name in CONFIGS_WITH_CODE:
            path = component.folder / name if component.folder else None
            if path and path.is_file() and "auto_map" in read_json(path):
                found.append(f"{part}/{name}, auto_map")
    index = component.folder / "model_index.json" if component.folder else None
    if index and index.is_file() and isinstance(read_json(index).get("_class_name"), list):
        found.append(f"{part}/model_index.json")
    return found


def _kernels(config: Mapping[str, Any]) -> list[str]:
    """Attention that transformers would fetch from a repository of the hub and import, at any depth."""
    found = []
    for key, value in config.items():
        if key.strip("_").startswith("attn_implementation"):
            names = value.values() if isinstance(value, dict) else [value]
            found += [name for name in names if isinstance(name, str) and "/" in name]
        elif isinstance(value, dict):
            found += _kernels(value)
    return found


def _is_library(name: str) -> bool:
    return name.split(".")[0] in LIBRARIES or name in _pipeline_modules()


@cache
def _pipeline_modules() -> frozenset[str]:
    """Modules of diffusers.pipelines, which model_index.json may name as a library; diffusers is not imported."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    pipelines = Path(spec.origin).parent / "pipelines"
    return frozenset(path.stem for path in pipelines.iterdir() if path.is_dir() or path.suffix == ".py")


def check(card: ModelCard, trusted: bool) -> None:
    """Raises UserError for a model that runs code of its own while nobody trusts it."""
    if card.code and not trusted:
        raise UserError(refusal(card.name, ", ".join(card.code)))


def check_component(path: str, part: str, component: Component, trusted: bool) -> None:
    """`check` for a component that --component-paths names."""
    code = in_component(part, component)
    if code and not trusted:
        raise UserError(f"--component-paths: {refusal(path, ', '.join(code))}")


def refusal(name: str, what: str) -> str:
    return f"{name} runs code from its repository ({what}): read it, then allow it with --trust-remote-code"


def warnings(model: Model, card: ModelCard, sources: Mapping[str, str]) -> list[str]:
    """The trust that nothing asks for, and the code that runs because a file allows it."""
    if model.trust_remote_code and not card.code:
        return [f"--trust-remote-code has no effect: {card.name} carries no code of its own"]
    return _running(card, f"model.trust_remote_code of the {where}") if (where := _file(model, sources)) else []


def notices(model: Model, card: ModelCard, sources: Mapping[str, str]) -> list[str]:
    """The code that runs because the command line allows it."""
    return _running(card, "--trust-remote-code") if model.trust_remote_code and not _file(model, sources) else []


def _running(card: ModelCard, allowed: str) -> list[str]:
    return [f"{card.name} runs code from its repository ({', '.join(card.code)}), allowed by {allowed}"] * bool(
        card.code
    )


def _file(model: Model, sources: Mapping[str, str]) -> str | None:
    """The kind of file that trusts the repository; None where the command line does, or nobody."""
    source = sources.get("model.trust_remote_code", "default")
    return SOURCE_NAMES.get(source, source) if model.trust_remote_code and source not in ("flag", "override") else None


def pipeline_class(card: ModelCard) -> Any:
    """The pipeline class that the repository defines; its code runs here. None where diffusers has the class."""
    if not card.code or "/" in card.code[0]:
        return None
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    assert card.folder is not None  # a model with weights
    return get_class_from_dynamic_module(
        str(card.folder), module_file=card.code[0], class_name=card.pipeline_class, trust_remote_code=True
    )
