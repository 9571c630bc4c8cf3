"""Components of a model with random weights, built from their configs; no weight file is read.

The native engine takes the tensors alone, which have the names and shapes of diffusers' checkpoints, so both backends
compute with the same numbers.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglang_gen.backends import loading_report, stand_in_tokenizer
from sglang_gen.hub import component_classes
from sglang_gen.hub.component_folder import has_vocabulary
from sglang_gen.types import Component, Plan
from sglang_gen.weights.random_weights import RandomTensors


def tensors(name: str, component: Component, dtype: torch.dtype) -> RandomTensors:
    """The tensors of the checkpoint of component `name`."""
    return RandomTensors(name, _without_weights(component), dtype)


def build_component(plan: Plan, name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Component `name` of the plan's model: a network with random weights, a scheduler, a tokenizer or a processor."""
    component = plan.card.components[name]
    kind = component_classes.named(component)
    if loading_report.is_reported(kind):
        return network(name, component, dtype, device)
    if hasattr(kind, "from_config"):
        return kind.from_config(dict(component.config))
    if name.startswith("tokenizer") and not has_vocabulary(_folder(component), component):
        return stand_in_tokenizer.build(plan.card.components[name.replace("tokenizer", "text_encoder")])
    folder = _folder(component)
    return kind.from_pretrained(str(folder)) if folder.is_dir() else kind()


def _folder(component: Component) -> Path:
    assert component.folder is not None  # the card was read from a folder of configs
    return component.folder


def _without_weights(component: Component) -> Any:
    """The network on the meta device, with real buffers."""
    return loading_report.without_weights(component_classes.named(component), component.config)


def network(name: str, component: Component, dtype: torch.dtype, device: str) -> nn.Module:
    """The network with each parameter drawn and placed on the device, so that the weights are in memory only once."""
    built: Any = _without_weights(component)
    kept, drawn = _kept_in_float32(built, dtype), RandomTensors(name, built, dtype)
    owners = defaultdict(list)  # of each tensor; modules may share one
    for module in built.modules():
        for key, parameter in module._parameters.items():
            owners[id(parameter)].append((module, key))
    for path, parameter in [*built.named_parameters()]:
        drawn.dtype = torch.float32 if kept & {*path.split(".")} else dtype
        placed = nn.Parameter(drawn.take(path).to(device), requires_grad=False)
        for module, key in owners[id(parameter)]:
            module._parameters[key] = placed
    if component.library == "diffusers" and not kept:
        for module in built.modules():  # diffusers rounds buffers too when it loads a network
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[key] = buffer.to(dtype)
    complete: nn.Module = built.to(device).eval()
    return complete


def _kept_in_float32(network: Any, dtype: torch.dtype) -> set[str]:
    """Parts of names of the parameters that the network's library keeps in float32 when it loads them."""
    if dtype.itemsize > 2:
        return set()
    always = getattr(network, "_keep_in_fp32_modules_strict", None) or ()
    listed = getattr(network, "_keep_in_fp32_modules", None) or ()
    transformers_rule = type(network).__module__.startswith("transformers.") and dtype is not torch.float16
    return {*always, *(() if transformers_rule else listed)}
