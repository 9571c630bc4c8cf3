"""Operations on tensors nested in lists, tuples, dicts and dataclasses, such as the arguments of a network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with every tensor replaced by `function(tensor)`, in order; other objects are unchanged."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: mapped(function, getattr(value, name)) for name in fields})
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a value in the order of `mapped`."""
    collected: list[Tensor] = []
    mapped(collected.append, value)
    return collected


def to_meta(value: Any) -> Any:
    """`value` with every tensor replaced by an empty tensor of the same shape on the meta device."""
    return mapped(lambda tensor: torch.empty_like(tensor, device="meta"), value)
