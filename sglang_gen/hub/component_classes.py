"""The classes named in a model_index.json."""

import importlib
from typing import Any

from sglang_gen import log
from sglang_gen.hub import remote_code
from sglang_gen.types import Component


def in_diffusers(name: str) -> bool:
    """Whether diffusers has a class of this name; a family of the native engine need not be one of diffusers'."""
    import diffusers  # a slow import, which listing its names does not make slower

    return name in dir(diffusers)


def named(component: Component) -> Any:
    """The class of a component, from its library or from a module of diffusers.pipelines."""
    library = component.library
    if library.split(".")[0] not in remote_code.LIBRARIES:
        library = f"diffusers.pipelines.{library}"
    with log.quieter("transformers"):  # it warns of missing packages that its image processors do not need
        return getattr(importlib.import_module(library), component.class_name)
