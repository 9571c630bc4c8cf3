"""The tiers of the suite: what a test without a mark does not start, and who may import whom."""

import ast
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
STARTED = {
    "a process": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
    "ranks": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "a compiler": lambda: torch.compile(torch.nn.Linear(1, 1)),
}


@pytest.mark.parametrize("what", STARTED)
def test_a_test_without_a_mark_fails_where_it_starts(what):
    with pytest.raises(pytest.fail.Exception, match="mark it whole"):
        STARTED[what]()


@pytest.mark.whole
def test_a_whole_test_may_start_a_process_and_fails_where_it_generates_code():
    STARTED["a process"]()
    with pytest.raises(pytest.fail.Exception, match="mark it slow"):
        STARTED["a compiler"]()
    torch.compile(torch.nn.Linear(1, 1), backend="eager")


def test_a_test_that_asks_for_ranks_is_a_whole_one(request):
    items = [item for item in request.session.items if {"ranks", "pool"} & set(getattr(item, "fixturenames", ()))]
    assert all(any(map(item.get_closest_marker, ("whole", "slow"))) for item in items)


def test_no_test_module_imports_another():
    for path in (*TESTS.rglob("*.py"),):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("test_", "conftest"))], path
