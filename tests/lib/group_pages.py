"""What the pages of the config groups must say, read from the schema: a row for every key, its type and its default."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum

from sglang_gen.config.flags import BY_PATH
from sglang_gen.config.schema import Run, get, leaves, plain

WORDS = {bool: "bool", int: "int", float: "float", str: "text", dict: "mapping", list: "list", type(None): "null"}


def type_words(kind: object) -> str:
    """A type as the pages spell it: `int or null`, `none, csv, wandb`, `list of texts`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(type_words(each) for each in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(kind.__members__)
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return f"list of {'mappings' if dataclasses.is_dataclass(item) else f'{type_words(item)}s'}"
    return WORDS[typing.get_origin(kind) or kind]


def start_of_row(path: str) -> str:
    """The row of a key up to its meaning: key, type, default, flag."""
    default = plain(get(Run(), path))
    flag = f"`{BY_PATH[path].option}`" if path in BY_PATH else ""
    shown = default if isinstance(default, str) else json.dumps(default)
    return f"| `{path}` | {type_words(leaves()[path])} | {shown} | {flag} |"


def keys(group: str) -> list[str]:
    """Config paths of a group, or of the root for an empty name."""
    return [path for path in leaves() if (path.rpartition(".")[0]) == group]


def table(group: str, meanings: Mapping[str, str]) -> str:
    """The table of a group's keys."""
    head = "| key | type | default | flag | description |\n|---|---|---|---|---|"
    return "\n".join([head, *(f"{start_of_row(path)} {meanings[path]} |" for path in keys(group))])
