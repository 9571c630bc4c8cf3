"""The classes that a model_index.json names."""

import importlib
from typing import Any

from sglang_gen import log, remote_code
from sglang_gen.engine import flow_match
from sglang_gen.types import Component


def named(component: Component) -> Any:
    """The class of a component: of a library, or of a module of diffusers' pipelines."""
    library = component.library
    if library.split(".")[0] not in remote_code.LIBRARIES:
        library = f"diffusers.pipelines.{library}"
    with log.quieter("transformers"):  # it remarks on packages that its image processors do without
        return getattr(importlib.import_module(library), component.class_name)


def scheduler(component: Component) -> Any:
    """A scheduler by its configuration: ours where ours knows all of it."""
    if component.class_name == flow_match.NAME and flow_match.knows(component.config):
        return flow_match.FlowMatchEuler(component.config)
    return named(component).from_config(component.config)
