"""The workspace of cuBLAS, which torch reads at the first product of a process: fixed before that, at every door."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang_gen.debug import command
from sglang_gen.engine import attention_kernels
from sglang_gen.env import Torchrun
from sglang_gen.errors import RunError
from sglang_gen.launch import torchrun, worker
from sglang_gen.perf import cpu_dtype

NAME = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.setenv(NAME, "")  # what a run sets is unset after the test
    monkeypatch.delenv(NAME)


@pytest.fixture
def computed(monkeypatch):
    """What the variable was at each product and attention."""
    seen = []

    def noting(function):
        def noted(*args, **kwargs):
            seen.append(os.environ.get(NAME))
            return function(*args, **kwargs)

        return noted

    functional = torch.nn.functional
    for owner, name in (
        (attention_kernels, "scaled_dot_product_attention"),
        (functional, "scaled_dot_product_attention"),
        (functional, "linear"),
        (functional, "conv2d"),
    ):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    return seen


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
@pytest.mark.parametrize("what", ["run", "dry run", "rates"])
def test_a_command_fixes_it_before_anything_is_computed(sglang, pipelines, computed, monkeypatch, backend, what):
    words = ["dry_run=true"] if what == "dry run" else []
    if what == "rates":
        monkeypatch.delenv("SGLANG_GEN_CPU_DTYPE")
        cpu_dtype._rates.cache_clear()
        monkeypatch.setenv("SGLANG_GEN_CACHE", "empty")
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", "--height", 32, "--width", 32,
                  "--num-inference-steps", 1, "deterministic=true", "--backend", backend, *words)  # fmt: skip
    assert done.code == 0, done.err
    assert len(computed) >= 2
    assert set(computed) == {":4096:8"}


def test_a_workspace_that_the_user_has_chosen_stays(sglang, pipelines, computed, monkeypatch):
    monkeypatch.setenv(NAME, ":16:8")
    assert sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", "dry_run=true").code == 0
    assert set(computed) == {":16:8"}


def test_a_rank_fixes_it_before_it_has_a_plan(monkeypatch):
    """Before its pipe is opened, over which the plan comes."""

    def connect(_):
        raise ConnectionError(os.environ.get(NAME))

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(worker, "Connection", connect)
    monkeypatch.setattr(worker, "_die_with", lambda launcher: None)
    monkeypatch.setattr(worker.sys, "argv", ["worker", "0", "1"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which main replaces
    try:
        with pytest.raises(ConnectionError, match=":4096:8"):
            worker.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_torchrun_fixes_it_before_it_meets_the_others(monkeypatch, rank):
    def join(_):
        raise RunError(str(os.environ.get(NAME)))

    monkeypatch.setattr(torchrun, "Rendezvous", SimpleNamespace(join=join))
    place = Torchrun(rank=rank, ranks=2, local=rank, here=2, node=0)
    with pytest.raises(RunError, match=":4096:8"):
        torchrun.run(place, lambda: 0, lambda error: 1)


def test_a_comparison_of_the_backends_fixes_it_before_its_plans_are_made(monkeypatch, sglang):
    def plans(_):
        raise RunError(f"the workspace is {os.environ.get(NAME)}")

    monkeypatch.setattr(command, "plans", plans)
    done = sglang("debug", "parity", "--prompt", "a")
    assert "the workspace is :4096:8" in done.err
