"""What torch.compile needs is looked for before a weight is read, and named if it is missing."""

import importlib.util
import os
import sysconfig
from pathlib import Path

import pytest
from native import runner

from sglang_gen import env
from sglang_gen.backends.native import engine as native_engine
from sglang_gen.errors import UserError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has these programs in its PATH, and triton and Python.h unless it has not."""

    def set_up(programs=(), triton=True, header=True, **variables) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in programs:
            (folder / name).touch(mode=0o755)
        include = tmp_path / "include"
        include.mkdir()
        if header:
            (include / "Python.h").touch()
        monkeypatch.setenv("PATH", str(folder))
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: (object() if triton else None) if name == "triton" else find(name)
        )
        get_path = sysconfig.get_path
        monkeypatch.setattr(
            sysconfig, "get_path", lambda name, *rest: str(include) if name == "include" else get_path(name, *rest)
        )
        monkeypatch.setattr(env.sys, "platform", "linux")

    return set_up


@pytest.mark.parametrize(
    ("device", "programs", "more", "missing"),
    [
        ("cpu", ["g++"], {}, None),
        ("cpu", ["g++"], {"triton": False}, None),
        ("cpu", ["gcc"], {}, "a C++ compiler (g++; CXX=clang++ takes another)"),
        ("cpu", ["clang++"], {}, "a C++ compiler (g++; CXX=clang++ takes another)"),
        ("cpu", ["clang++"], {"CXX": "clang++"}, None),
        ("cpu", ["g++"], {"CXX": "icpx"}, "there is no 'icpx', which the environment variable CXX names"),
        ("cpu", ["g++"], {"header": False}, "the headers of this Python (python3-dev), and there is no "),
        ("cuda", ["gcc"], {}, None),
        ("cuda", ["clang"], {}, None),
        ("cuda", ["g++"], {}, "a C compiler (gcc or clang)"),
        ("cuda", ["gcc"], {"CC": "icx"}, "there is no 'icx', which the environment variable CC names"),
        ("cuda", ["gcc"], {"triton": False}, "the package triton (pip install triton)"),
        ("cuda", ["gcc"], {"header": False}, "the headers of this Python (python3-dev), and there is no "),
    ],
)
def test_what_a_compiler_lacks_is_named(machine, device, programs, more, missing):
    machine(programs, **more)
    found = env.missing_for_compiling(device)
    assert found == missing if missing is None else missing in found
    if missing is None:
        env.require_compiler(device)
    else:
        place = "CPU" if device == "cpu" else "a GPU"
        with pytest.raises(UserError, match=f"^compile: torch.compile on {place} needs .*; install it, or run with "):
            env.require_compiler(device)


def test_this_machine_compiles():
    assert Path(sysconfig.get_path("include"), "Python.h").exists()
    assert env.missing_for_compiling("cpu") is None, os.environ.get("PATH")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("word", "backend"),
    [
        ("compile=regional", "sglang"),
        ("compile=full", "sglang"),
        ("attention=flex", "sglang"),
        ("compile=full", "diffusers"),
    ],
)
def test_a_run_that_will_compile_is_refused_before_weights_and_in_a_dry_run(
    pipelines, sglang, machine, monkeypatch, word, backend
):
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    machine(["g++"], header=False)
    monkeypatch.setattr(native_engine, "build", read)
    monkeypatch.setattr("sglang_gen.backends.diffusers.engine._read", read)
    for more in ((), ("dry_run=true",)):
        done = runner(pipelines, sglang)("sd3", word, *more, "--backend", backend)
        assert done.code == 2
        assert "on CPU needs the headers of this Python (python3-dev), and there is no" in done.lines[-1]
