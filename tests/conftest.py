"""Shared by all tests: tiny pipelines built once per session, and the command run in process."""

import gc
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks only lose by threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the CPU, on a machine with GPUs too
os.environ["SGLANG_GEN_CPU_DTYPE"] = "float32"  # dtype=auto, whatever this processor multiplies faster
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import one_rank
import pytest
import sentences
import shared_loader
import tiers
import tiny
import torch
from finished import Finished
from pool import Pool
from rank_runs import Processes
from repeated import Repeated

from sglang_gen import env
from sglang_gen.config import compose
from sglang_gen.launch import launcher, rank, session
from sglang_gen.report import vega_scripts

torch.set_num_threads(1)
MISSING, PREDICTIONS, PROCESSES = vega_scripts.missing, rank.PREDICTIONS, session.processes


def pytest_make_parametrize_id(val: object) -> str | None:
    """Functions by their names: two processes of one run must collect the same ids."""
    return val.__name__ if isinstance(val, FunctionType) else None


def pytest_configure() -> None:
    sentences.watch()


def pytest_itemcollected(item: pytest.Item) -> None:
    tiers.sort(item)


def pytest_collection_finish() -> None:
    """Collect garbage as rarely as the command does, and never again among the 500,000 objects of the imports."""
    env.collect_rarely()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Grouped(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return tiers.group(config.rootpath / nodeid.partition("::")[0])

    return Grouped(config, log)


@pytest.fixture(scope="session", autouse=True)
def _commit() -> None:
    """Ask git once, before any test; every record of a run holds the answer."""
    env.commit_hash()


@pytest.fixture(scope="session", autouse=True)
def _unchanged_checkout() -> Iterator[None]:
    """No test adds a file to the folders of the checkout, where other tests would find it."""
    before = _checkout()
    yield
    assert _checkout() == before


def _checkout() -> set[Path]:
    root = Path(__file__).parents[1]
    folders = ("conf", "docs", "sglang_gen", "sweeps")
    found = {path for folder in folders for path in (root / folder).rglob("*")}
    return {path for path in found if "__pycache__" not in path.parts}


@pytest.fixture(autouse=True)
def _nothing_beyond_the_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of `make check` starts no process and no compiler."""
    tiers.limit(request.node, monkeypatch)


@pytest.fixture(autouse=True)
def _sentences_are_our_own() -> Iterator[None]:
    """No test makes a message, or logs a warning, with the words of a library; see `test_sentences`."""
    sentences.seen.clear()
    yield
    assert sentences.foreign(sentences.seen) == []


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny pipelines by name: sd15, sdxl, sd3, flux."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: build(root / f"tiny-{name}") for name, build in tiny.BUILDERS.items()}


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """The one pool of gloo ranks, started for the first test that asks for it: they run any function."""
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="session")
def pool() -> Iterator[Processes]:
    """The rank processes of whole runs, started for the first test that asks for them."""
    shared = Processes()
    yield shared
    shared.close()


@pytest.fixture
def run_on_ranks(pipelines, sglang, pool: Processes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Generate two steps with a tiny pipeline on the shared rank processes, latents saved."""
    monkeypatch.setattr(launcher, "open_ranks", pool.open)

    def generate(name, *words: object, steps=2, side=32, prompt: str | None = "a cat", dtype="float32") -> Finished:
        given = ("--prompt", prompt) if prompt else ()
        size = [word for option in ("--height", "--width") if option not in words for word in (option, side)]
        return sglang("generate", "--model-path", pipelines.get(name, name), *given, "--seed", 7, "--dtype", dtype,
                      "--num-inference-steps", steps, "output.latents=true", *size, *words)  # fmt: skip

    return generate


@pytest.fixture(autouse=True)
def _private_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a working directory and a cache of its own, and never asks a hub."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("SGLANG_USE_MODELSCOPE", raising=False)


@pytest.fixture(autouse=True)
def _log_of_a_new_process() -> None:
    """The command of an earlier test has set up the log, and `caplog` would hear nothing of it."""
    logger = logging.getLogger("sglang_gen")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def _compositions_with_one_loader() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "compose_partly", shared_loader.compose_partly)
        yield


@pytest.fixture(autouse=True)
def _sweeps_without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report takes a second; the tests of reports ask for it with the fixture `reports`."""
    monkeypatch.setattr(vega_scripts, "missing", lambda: ["altair"])


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vega_scripts, "missing", MISSING)


@pytest.fixture(autouse=True)
def _dumps_without_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions take up to 0.3 s; the tests of predictions ask for them with the fixture `predictions`."""
    monkeypatch.setattr(rank, "PREDICTIONS", "no_predictions")


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "PREDICTIONS", PREDICTIONS)


@pytest.fixture(autouse=True)
def _sessions_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes seconds to import torch; the tests of a session's processes ask with the fixture `processes`."""
    monkeypatch.setattr(session, "processes", one_rank.processes)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "processes", PROCESSES)


@pytest.fixture
def sglang(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run `sglang ARGV...` in this process."""
    from sglang_gen.cli import main

    def run(*argv: object) -> Finished:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Repeated]:
    """CUDA graphs on this CPU; the recorders that were asked for."""
    from sglang_gen.engine import cuda_graphs
    from sglang_gen.plan import make

    made: list[Repeated] = []
    monkeypatch.setattr(Repeated, "made", made, raising=False)
    monkeypatch.setattr(cuda_graphs, "Recorder", Repeated)
    monkeypatch.setattr(make, "CAPTURING", ("cuda", "cpu"))
    return made


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """torch.compile without its code generation; how often it was asked for a graph."""
    from sglang_gen.engine import compile as compiling

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        compiling,
        "_compiled",
        lambda function, *_: torch.compile(function, backend=backend, fullgraph=True, dynamic=False),
    )
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.fixture
def composed(sglang: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What `sglang generate ARGV...` would carry out: the composed run; a list of them, one for each job, with -m."""
    seen: list[Any] = []
    monkeypatch.setattr(
        importlib.import_module("sglang_gen.generate"), "execute", lambda composed, _=None: seen.append(composed)
    )

    def run(*argv: object) -> Any:
        seen.clear()
        done = sglang("generate", *argv)
        assert done.code == 0, done.err
        return list(seen) if "-m" in argv else seen[0]

    return run
