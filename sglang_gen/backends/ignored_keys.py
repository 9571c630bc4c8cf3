"""Warns of keys in the configs of components that the installed classes do not take, and so ignore."""

import inspect
from collections.abc import Iterable
from typing import Any

from sglang_gen import log
from sglang_gen.hub import component_classes
from sglang_gen.hub.weight_files import few
from sglang_gen.types import Component


def warn(component: Component, name: str) -> None:
    """Warn of the keys of a component of diffusers that its class ignores; a newer diffusers may have written them."""
    if component.library != "diffusers":
        return
    if ignored := _ignored(component_classes.named(component), component.config):
        log.warn_once(
            f"The {name}'s config has keys that {component.class_name} ignores ({few(ignored)}); the result can differ "
            "from that of the diffusers version that wrote them"
        )


def _ignored(kind: Any, config: Iterable[str]) -> list[str]:
    """Sorted. Schedulers share their configs, so a key of another scheduler that can replace this one is known."""
    known = {"quantization_config"}
    for alike in (kind, *(kind._get_compatibles() if getattr(kind, "has_compatibles", False) else ())):
        known |= inspect.signature(alike.__init__).parameters.keys()
    return sorted(key for key in config if not key.startswith("_") and key not in known)
