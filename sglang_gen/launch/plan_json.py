"""The plan as JSON, for ranks on other machines: reading it creates data of the known types and runs no code."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Union

from sglang_gen.config.schema import Run, plain
from sglang_gen.types import Plan


def encode(plan: Plan) -> str:
    """The plan as a JSON text."""
    return json.dumps(plain(plan))


def decode(text: str | bytes) -> Plan:
    """The plan that `encode` wrote. Raises ValueError for any other text."""
    try:
        plan: Plan = _read(json.loads(text), Plan)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("is not a plan") from error
    return plan


def _read(value: Any, kind: Any) -> Any:
    """`value`, as parsed from JSON, as an object of the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, localns={"Run": Run})
        return typing.cast(type, kind)(**{name: _read(value[name], hints[name]) for name in hints})
    if origin in (Union, types.UnionType):
        return value if value is None else _read(value, arguments[0])
    if origin in (Mapping, dict):
        return {name: _read(item, arguments[1]) for name, item in value.items()}
    if origin in (tuple, list, frozenset):
        return origin(_read(item, arguments[0]) for item in value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[value]
    return Path(value) if kind is Path else value
