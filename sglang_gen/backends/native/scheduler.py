"""The scheduler of a native run: ours where ours knows all of its configuration, else that of diffusers."""

from typing import Any

from sglang_gen.engine import flow_match_euler
from sglang_gen.hub.component_classes import named
from sglang_gen.types import Component


def build_scheduler(component: Component) -> Any:
    """A scheduler by its configuration: ours where ours knows all of it."""
    if component.class_name == flow_match_euler.SCHEDULER_NAME and flow_match_euler.knows(component.config):
        return flow_match_euler.FlowMatchEuler(component.config)
    return named(component).from_config(component.config)
