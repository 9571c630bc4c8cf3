"""Which cases of a parametrized test are of a later tier: those that say again what another case says."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """All values as cases, of which those in `fast` keep the tier of the test and the others are slow."""
    return _mostly("slow", values, fast)


def mostly_whole(values: Iterable[Any], *fast: Any) -> list[Any]:
    """All values as cases, of which those in `fast` are part of `make check` and the others of `make test`."""
    return _mostly("whole", values, fast)


def _mostly(mark: str, values: Iterable[Any], fast: tuple[Any, ...]) -> list[Any]:
    values = list(values)
    assert all(value in values for value in fast), fast
    return [value if value in fast else _marked(value, mark) for value in values]


def _marked(value: Any, mark: str) -> Any:
    """A case with a mark, which one that has a mark already keeps."""
    if isinstance(value, type(pytest.param())):
        return value
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=getattr(pytest.mark, mark))
