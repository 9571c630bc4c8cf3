"""What a test may start, by the tier that it belongs to.

A test without a mark is part of `make check`: it starts no process, no ranks and no compiler, and takes less than half
a second. One marked `whole` is part of `make test` and may start processes and have torch trace a network, but not
generate code; one marked `slow` or `bench` may do anything, and is whole or not.
"""

import functools
import multiprocessing.process
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS = ("ranks", "pool", "run_on_ranks")  # fixtures that start ranks
WHOLE = (*RANKS, "traced", "props", "example")  # and those that have torch trace, run a page or one of its examples
COMPILED = ("generated",)  # that have torch generate code
USES_RANKS = re.compile(rf"^def test_.*\b(?:{'|'.join(RANKS)})\b", re.MULTILINE)
ANYTHING = ("slow", "bench")


def sort(item: pytest.Item) -> None:
    """Give a test the mark of its tier by what it uses."""
    used = set(getattr(item, "fixturenames", ()))
    if used & set(WHOLE):
        item.add_marker("whole")
    if used & set(COMPILED):
        item.add_marker("slow")


@functools.cache
def group(file: Path) -> str:
    """The tests of a file run in one process, for the sake of its fixtures; those of all files that use ranks in one.

    Groups of pytest-xdist by mark would be finer; version 3.8 does not find them with pytest 9.2.
    """
    return "ranks" if USES_RANKS.search(file.read_text(encoding="utf-8")) else file.name


def limit(item: pytest.Item, patch: pytest.MonkeyPatch) -> None:
    """Make the test fail where it starts what its tier does not."""
    if any(map(item.get_closest_marker, ANYTHING)):
        return
    if item.get_closest_marker("whole"):
        patch.setattr(torch, "compile", traced_alone(torch.compile))
        return
    patch.setattr(subprocess.Popen, "__init__", refuse("starts a process", "whole"))
    patch.setattr(multiprocessing.process.BaseProcess, "start", refuse("starts a process", "whole"))
    patch.setattr(torch, "compile", refuse("calls torch.compile", "whole"))


def traced_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a backend of the test's own, which takes the graphs; that of torch generates code."""

    @functools.wraps(original)
    def traced(*words: Any, **settings: Any) -> Any:
        return original(*words, **settings) if "backend" in settings else refuse("generates code", "slow")()

    return traced


def refuse(what: str, mark: str) -> Callable[..., Any]:
    """A function whose call fails the test, past every `except Exception`."""

    def refused(*_: object, **__: object) -> None:
        pytest.fail(f"this test {what}: mark it {mark}")

    return refused
