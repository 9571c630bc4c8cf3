"""The classes named in a model_index.json."""

import importlib
from functools import cache
from typing import Any

from sglang_gen.errors import UserError, nearest
from sglang_gen.hub import remote_code
from sglang_gen.types import Component


def in_diffusers(name: str) -> bool:
    """Whether diffusers has a class of this name; a family of the native engine need not be one of diffusers'."""
    import diffusers

    return name in _names(diffusers)


def named(component: Component) -> Any:
    """The class of a component, from its library or from a module of diffusers.pipelines.

    Raises UserError for a class that the installed library does not have, or that needs a missing package.
    """
    check(component)
    kind = getattr(_library(component), component.class_name)
    if type(kind).__name__ == "DummyObject":  # what diffusers has in place of a class whose packages are missing
        from diffusers.utils.import_utils import BACKENDS_MAPPING

        lacking = [package for package in kind._backends if not BACKENDS_MAPPING[package][0]()]
        raise UserError(f"{component.class_name} needs the package {', '.join(lacking)}: pip install {lacking[0]}")
    return kind


def check(component: Component) -> None:
    """Raises UserError for a class that the installed library does not have.

    Imports the module of a class only if the library does not list it: transformers 5 keeps old names, such as those of
    fast tokenizers, as aliases that it does not list.
    """
    library = _library(component)
    names = _names(library)
    if component.class_name not in names and not hasattr(library, component.class_name):
        raise UserError(
            f"The model has a component of the class {component.class_name}, which the installed "
            f"{component.library} does not have{nearest(component.class_name, names)}"
        )


@cache
def _names(library: Any) -> frozenset[str]:
    """Public names of a library, without importing their modules. transformers takes 0.1 seconds to list its own."""
    return frozenset(dir(library))


def _library(component: Component) -> Any:
    library = component.library
    if library.split(".")[0] not in remote_code.LIBRARIES:
        library = f"diffusers.pipelines.{library}"
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise UserError(
            f"The model has a component of {component.library}, which is not installed or not a part of diffusers"
        ) from error
