"""The report of the first minutes on a GPU: on this CPU, and its code for GPUs on a fake one."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import mostly_slow
from fake_cuda import fake_cuda, guard
from repeated import Repeated

from sglang_gen.engine import cuda_graphs
from tools.bench import network_entries, networks
from tools.gpu_first import attention, environment, graphs, network, rates, runs, sections, steps
from tools.gpu_first.__main__ import SECTIONS, main
from tools.gpu_first.sections import FAILED, Section, Settings, SkippedError

pytestmark = [
    pytest.mark.whole,
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # of Python 3.12, where threads run
]
CPU, GPU = Settings("cpu", "tiny"), Settings("cuda", "tiny")


def fail(settings: Settings) -> str:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nfurther lines")


def skip(settings: Settings) -> str:
    raise SkippedError("no such thing here")


def hang(settings: Settings) -> str:
    time.sleep(60)
    return ""


def good(settings: Settings) -> str:
    return f"on a {settings.device}"


def die(settings: Settings) -> str:
    os._exit(3)


def partly(settings: Settings) -> str:
    return f"| one | fine |\n| other | {FAILED}: no kernel |"


WORKS = {"good": good, "bad": fail, "dead": die, "partly": partly, "not here": skip}


def test_a_section_that_fails_or_dies_is_named_and_does_not_end_the_others():
    outcomes = sections.run_all([Section(title, work, 60) for title, work in WORKS.items()], CPU, budget=300)
    assert [(outcome.title, outcome.result, outcome.reason) for outcome in outcomes] == [
        ("good", "passed", ""),
        ("bad", "failed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("dead", "failed", "its process died with exit code 3"),
        ("partly", "failed", "1 of its parts: other | **failed**: no kernel"),
        ("not here", "skipped", "no such thing here"),
    ]
    text = sections.report(outcomes, "Report")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert re.match(r"\| bad \| failed \| \d+ \| RuntimeError: CUDA error", rows[2])
    assert "further lines" in text
    assert "on a cpu" in text


@pytest.mark.slow
def test_a_section_that_hangs_is_ended_and_a_spent_budget_skips_the_rest(monkeypatch):
    monkeypatch.setattr(sections, "GRACE", 0.1)
    works = [Section("hangs", hang, 0.5), Section("good", WORKS["good"], 60), Section("hangs again", hang, 60),
             Section("late", WORKS["good"], 60)]  # fmt: skip
    started = time.monotonic()
    outcomes = sections.run_all(works, CPU, budget=3)
    assert time.monotonic() - started < 20
    assert [outcome.result for outcome in outcomes] == ["failed", "passed", "failed", "skipped"]
    assert outcomes[0].reason.startswith("took longer than")
    assert outcomes[3].reason == "the budget of 3 s is spent"


def test_the_command_writes_the_report_and_its_exit_code_says_whether_a_section_failed(monkeypatch, capfd):
    assert main(["--device", "cpu", "--size", "tiny", "--only", "environment,graphs", "--output", "a.md"]) == 0
    assert re.search(r"\| CUDA graphs \| skipped \| \d+ \| a CPU has no CUDA graphs \|", Path("a.md").read_text())
    monkeypatch.setitem(SECTIONS, "rates", Section("rates", fail, 60))
    assert main(["--device", "cpu", "--size", "tiny", "--only", "rates", "--output", "b.md"]) == 1
    assert re.search(r"\| rates \| failed \| \d+ \| RuntimeError: CUDA error", Path("b.md").read_text())


@pytest.mark.slow
def test_sections_are_spawned_where_an_import_has_touched_cuda(monkeypatch):
    """A forked process could not use the GPU; torch says so."""
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    sections.start_method.cache_clear()
    try:
        assert sections.start_method() == "spawn"
        outcome = sections.run_section(SECTIONS["environment"], CPU, 60)
    finally:
        sections.start_method.cache_clear()
    assert outcome.result == "passed", outcome.text


@pytest.mark.slow
def test_every_section_runs_on_a_cpu_with_tiny_networks():
    command = [sys.executable, "-m", "tools.gpu_first", "--device", "cpu", "--size", "tiny"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == 0, done.stdout + done.stderr
    text = Path("gpu_first.md").read_text()
    results = dict(line.split(" | ")[:2] for line in text.split("\n\n")[1].splitlines()[2:])
    assert results == {
        f"| {each.title}": "skipped" if name == "graphs" else "passed" for name, each in SECTIONS.items()
    }
    for said in (
        "| package torch |",
        "| bf16 |",
        "attention=auto chooses",
        "| compile=regional |",
        "| none | sglang |",
    ):
        assert said in text


@pytest.fixture
def gpu(monkeypatch):
    if guard.compiler() is None:
        pytest.skip("the device guard of the fake GPU needs a C++ compiler")
    monkeypatch.setattr(cuda_graphs, "Recorder", Repeated)
    monkeypatch.setattr(Repeated, "made", [], raising=False)
    with fake_cuda() as fake:
        yield fake


def test_the_code_for_a_gpu_runs_on_a_fake_one(gpu, monkeypatch):
    described = environment.describe(GPU)
    assert "| GPU | a fake GPU, 132 multiprocessors |" in described
    assert "| compute capability | 9.0 |" in described
    measured = rates.measure(GPU)
    assert [line.split(" | ")[0] for line in measured.splitlines()[2:5]] == ["| bf16", "| fp16", "| fp8"]
    assert "### a tiny sdxl" in attention.order(GPU)
    assert gpu.of("device") == []


def test_replays_of_a_graph_are_compared_with_eager_evaluations(gpu, monkeypatch):
    text = graphs.compare(GPU)
    assert text.count("equal") == 6
    assert FAILED not in text
    monkeypatch.setattr(cuda_graphs, "_is_in", lambda *_: True)  # no buffer is ever filled again
    text = graphs.compare(GPU)
    assert text.count(FAILED) == 2  # the second replay of each network


def test_a_mode_that_fails_is_a_line_of_the_table(gpu, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no capture")

    monkeypatch.setattr(steps, "profiled", lambda *_: (1.0, 4.0, [(("a kernel", 2), 1.0)]))
    monkeypatch.setattr(steps.network_entries, "Compiled", refuse)
    text = steps.of("flux_dev")(GPU)
    rows = {line.split(" | ")[0]: line for line in text.split("\n\n")[1].splitlines()}
    assert "| 75% |" in rows["| eager"]  # idle
    assert f"| CUDA graphs | {FAILED}" not in text
    assert rows["| compile=regional"].startswith(f"| compile=regional | {FAILED}: RuntimeError: no capture")


@pytest.mark.parametrize("mode", mostly_slow(["regional", "full"], "regional"))
def test_a_network_is_compiled_by_blocks_or_as_a_whole(traced, mode):
    work = network.chosen(CPU)["flux_dev"]
    model, condition, latents = network.drawn(work, CPU)
    kernel = networks.kernel_of_auto(work, "cpu", torch.float32)
    calls = [
        network_entries.our_call(
            work, lambda: (network_entries.sharing(model), condition, latents), "cpu", kernel, each
        )
        for each in ("eager", mode)
    ]
    with torch.no_grad():
        assert torch.equal(*(call() for call in calls))
    assert len(traced) == (1 if mode == "full" else 2)  # or one for each class of blocks


def test_the_sections_are_of_the_published_networks():
    assert network.NAMES == ("flux_dev", "sdxl")
    assert list(SECTIONS)[-2:] == ["flux_dev", "sdxl"]
    assert runs.chosen(Settings("cuda", "full")).preset == "sdxl"


def test_a_known_card_below_its_rate_is_a_failure(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    text = rates.measure(GPU)
    assert "known rate of this machine: 790.0 TFLOP/s" in text
    assert f"{FAILED}: below 70%" in text
