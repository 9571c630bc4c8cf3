"""Tensors inside of lists, tuples, dicts and dataclasses, which is how networks take their arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same value with `function` of every tensor in its place, in order; what holds no tensor stays as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: mapped(function, item) for name, item in vars(value).items()})
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a value in the order of `mapped`."""
    found: list[Tensor] = []
    mapped(found.append, value)
    return found


def to_meta(value: Any) -> Any:
    """The same value with tensors that have shapes and no numbers."""
    return mapped(lambda tensor: torch.empty_like(tensor, device="meta"), value)
