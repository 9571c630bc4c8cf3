"""The scheduler of a native run: our own if it supports the whole configuration, else diffusers'."""

from typing import Any

from sglang_gen.backends import ignored_keys
from sglang_gen.engine import flow_match_euler
from sglang_gen.hub.component_classes import named
from sglang_gen.types import Component


def has_own_scheduler(component: Component) -> bool:
    """Whether our flow-match Euler scheduler supports the whole configuration."""
    return component.class_name == flow_match_euler.SCHEDULER_NAME and flow_match_euler.knows(component.config)


def build_scheduler(component: Component) -> Any:
    """Build our scheduler if it supports the configuration, else diffusers'."""
    if has_own_scheduler(component):
        return flow_match_euler.FlowMatchEuler(component.config)
    ignored_keys.warn(component, "scheduler")
    return named(component).from_config(component.config)
