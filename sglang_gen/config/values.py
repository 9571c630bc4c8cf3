"""Converts text, JSON and YAML to the types of the schema. Refuses duplicate keys and values that JSON cannot hold."""

import dataclasses
import json
import math
import numbers
import os
import types
import typing
from enum import Enum
from functools import cache
from typing import Any, NoReturn, Union

from sglang_gen.config.aliases import check_aliases
from sglang_gen.errors import InvalidValueError

DEPTH, SIZE = 64, 1_000_000  # limits for the contents of a file or flag; a YAML alias can contain itself


def parse_json(text: str) -> Any:
    """Parse a JSON text. Raises InvalidValueError with a clause ("is not valid JSON: ...")."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite, parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f" in line {error.lineno}" if "\n" in text else f" at character {error.pos + 1}"
        raise InvalidValueError(f"is not valid JSON: {error.msg}{where}") from None
    except RecursionError:
        raise InvalidValueError("is nested too deeply") from None
    check_plain(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidValueError(f"gives the key '{next(name for name in names if names.count(name) > 1)}' twice")
    return unique


def _not_finite(word: str) -> NoReturn:
    raise InvalidValueError(f"holds {word}; a number must be finite")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise InvalidValueError("holds an integer of more than 64 bits")
    return int(digits)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text with the safe loader. Raises InvalidValueError with a clause ("is not valid YAML: ...")."""
    import yaml

    check_aliases(text)
    try:
        value = yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as error:
        raise InvalidValueError(f"is not valid YAML: {yaml_problem(error)}") from None
    except RecursionError:
        raise InvalidValueError("is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError):  # raised by the constructors of tags: !!bool maybe
        raise InvalidValueError("is not valid YAML: a value does not fit its tag, or a number is too long") from None
    check_plain(value)
    return value


def yaml_problem(error: Any) -> str:
    """What a `yaml.YAMLError` says is wrong, and the line: "found duplicate key seed in line 2"."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f" in line {mark.line + 1}" if mark else ""
    return f"{problem or getattr(error, 'reason', 'unreadable')}{where}"


@cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader that refuses duplicate keys and keeps dates as text."""

        yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and shape
            letter: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
            for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def flatten_mapping(self, node: Any) -> None:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' twice", problem_mark=key.start_mark)
            super().flatten_mapping(node)

    return Loader


def check_plain(content: Any) -> None:
    """Raises InvalidValueError for values that UTF-8 JSON cannot represent, with their place: "a.b is nan; ..."."""
    pending, seen = [("", content, 0)], 0
    while pending:
        where, value, depth = pending.pop()
        seen += 1
        if depth > DEPTH or seen > SIZE:
            raise InvalidValueError("is nested too deeply, or is too large")
        if isinstance(value, dict):
            pending += [(f"{where}.{name}" if where else str(name), item, depth + 1) for name, item in value.items()]
            pending += [(f"the key '{name!r}'", name, depth + 1) for name in value]
        elif isinstance(value, list):
            pending += [(f"{where}[{index}]", item, depth + 1) for index, item in enumerate(value)]
        else:
            _check_scalar(where or "it", value)


def _check_scalar(where: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidValueError(f"{where} holds characters that are not Unicode text") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidValueError(f"{where} is {value}; it must be a finite number")
    elif isinstance(value, int):
        if value.bit_length() > 64:
            raise InvalidValueError(f"{where} is an integer of more than 64 bits")
    elif value is not None:
        raise InvalidValueError(f"{where} is of the type {type(value).__name__}, which JSON does not have")


def coerce(value: Any, kind: Any) -> Any:
    """Convert `value` to the schema's type `kind`. Accepts text from a command line, parsed JSON or YAML, and paths and
    numbers from Python, including numpy's.

    Raises InvalidValueError with a clause ("is not an integer") for a value of the wrong type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args)
    if dataclasses.is_dataclass(kind):
        return _coerce_dataclass(value, typing.cast(type, kind))
    if origin is dict:
        return _coerce_dict(value, args[1])
    if origin is list:
        return _coerce_list(value, args[0])
    if kind is Any:
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.name for member in kind]
        if isinstance(value, kind):
            return value
        if not isinstance(value, str) or value not in names:
            raise InvalidValueError(f"is not one of {', '.join(names)}")
        return kind[value]
    return _coerce_scalar(value, kind)


def _coerce_union(value: Any, args: tuple[Any, ...]) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [kind for kind in args if kind is not type(None)]
    if bool in kinds and str in kinds:  # dry_run: the strings true and false are booleans
        return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else coerce(value, bool)
    return coerce(value, kinds[0])


def _coerce_dataclass(value: Any, cls: type) -> Any:
    hints = typing.get_type_hints(cls)
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise InvalidValueError(f"is not a mapping with the keys {', '.join(hints)}")
    for name in value:
        if name not in hints:
            raise InvalidValueError(f"has the unknown key '{name}'; the keys are {', '.join(hints)}")
    return cls(**{name: coerce(item, hints[name]) for name, item in value.items()})


def _coerce_dict(value: Any, item_kind: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json(value)
    if not isinstance(value, dict):
        raise InvalidValueError("is not a JSON object")
    return {str(name): coerce(item, item_kind) for name, item in value.items()}


def _coerce_list(value: Any, item_kind: Any) -> list[Any]:
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
        if not value:
            raise InvalidValueError("is an empty list")
    if not isinstance(value, (list, tuple)):
        raise InvalidValueError("is not a list")
    return [coerce(item, item_kind) for item in value]


def _coerce_scalar(value: Any, kind: type) -> Any:
    if kind is str:
        return _coerce_text(value)
    if kind is bool:
        words = {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise InvalidValueError("is not true or false")
        return value
    noun = "an integer" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):  # numpy's scalars are numbers.Real
        raise InvalidValueError(f"is not {noun}")
    if kind is int and not isinstance(value, (numbers.Integral, str)) and not float(value).is_integer():
        raise InvalidValueError(f"is not {noun}")
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise InvalidValueError(f"is not {noun}") from None


def _coerce_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise InvalidValueError("is not text (quotes make it text)")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidValueError("is not Unicode text") from None
    return value
