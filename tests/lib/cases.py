"""Which cases of a parametrized test are slow ones: those that say again what another case says."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """All values as cases, of which those in `fast` run with the fast tests and the others with the slow ones."""
    values = list(values)
    assert all(value in values for value in fast), fast
    return [value if value in fast else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
