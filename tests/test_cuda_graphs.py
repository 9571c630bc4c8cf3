"""CUDA graphs of the native engine, but for the graph: a stand-in computes the captured evaluation at each replay."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import mostly_whole
from native import COMMON, assert_same, record, runner
from repeated import Repeated
from torch import Tensor

from sglang_gen.engine import compile as compiling
from sglang_gen.engine import cuda_graphs
from sglang_gen.errors import RunError
from sglang_gen.launch import rank
from sglang_gen.perf.memory import Checkpoint, Memory
from sglang_gen.plan import make

NETWORKS = ("sd3", "flux", "sdxl", "sd15")


@pytest.fixture
def both(pipelines, sglang, recorders):
    """The same run without graphs and with; the recorder of the second."""
    run = runner(pipelines, sglang)

    def generate(name, *words, count=1) -> Repeated:
        for folder, more in (("plain", ()), ("graphs", ("compile.cuda_graphs=true",))):
            done = run(name, "--backend", "sglang", *words, *more, folder=folder)
            assert done.code == 0, done.err
        assert_same("graphs", "plain", count)
        (recorder,) = recorders
        return recorder

    return generate


@pytest.mark.parametrize("name", mostly_whole(NETWORKS, "sd3"))
def test_a_network_is_captured_once_and_replayed_in_every_step(both, name):
    recorder = both(name, "--guidance-scale", "3")
    assert len(recorder.shapes) == 1
    assert recorder.replays == 3 + (name == "sd15")  # PNDM evaluates once more
    assert record("plain")["effective"]["cuda_graphs"] is False
    kept = record("graphs")
    assert kept["requested"]["cuda_graphs"] is True
    assert kept["effective"]["cuda_graphs"] is True


@pytest.mark.whole
@pytest.mark.parametrize("name", NETWORKS)
def test_another_prompt_in_the_same_process_is_not_the_first_one_again(pipelines, sglang, recorders, name):
    prompts = 'sampling.prompts=[{prompt: a cat},{prompt: "two dogs, running"},{prompt: a lake}]'
    words = (prompts, *COMMON, "--dtype", "float32", "--height", 32, "--width", 48, "--guidance-scale", 3)
    for folder, more in (("plain", ()), ("graphs", ("compile.cuda_graphs=true",))):
        done = sglang("generate", "--model-path", pipelines[name], *words, "--num-inference-steps", 3,
                      "--output-path", folder, *more)  # fmt: skip
        assert done.code == 0, done.err
    assert_same("graphs", "plain", 3)
    assert len(recorders[0].shapes) == 1


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_a_smaller_last_batch_has_a_graph_of_its_own(both, name):
    words = ("--guidance-scale", "3", "--num-samples", "5", "sampling.batch_size=2")
    recorder = both(name, *words, count=5)
    assert [shape[0] for shape in recorder.shapes] == [4, 2]
    assert recorder.replays == 9


@pytest.mark.whole
def test_branches_in_turn_share_a_graph_and_do_not_share_a_result(both):
    words = ("--guidance-scale", "3", "--negative-prompt", "dark", "sampling.guidance_batching=sequential")
    recorder = both("sdxl", *words)
    assert [shape[0] for shape in recorder.shapes] == [1]
    assert recorder.replays == 6


@pytest.mark.whole
def test_steps_without_guidance_have_a_graph_of_their_own(both):
    recorder = both("sd3", "--guidance-scale", "3", "sampling.guidance_interval=[0,0.4]")
    assert [shape[0] for shape in recorder.shapes] == [2, 1]
    assert recorder.replays == 3


@pytest.mark.slow
@pytest.mark.parametrize("regional", ["true", "false"])
def test_what_is_captured_is_what_was_compiled(both, monkeypatch, regional):
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    def compiled(function, ranks, options):
        assert (ranks, options) == (1, {})
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    monkeypatch.setattr(compiling, "_compiled", compiled)
    torch._dynamo.reset()
    both("sd3", "--enable-torch-compile", f"compile.regional={regional}", "--warmup")
    torch._dynamo.reset()
    assert traced
    assert record("graphs")["effective"]["compile"] == ("regional" if regional == "true" else "full")


@pytest.mark.whole
def test_the_fingerprint_tells_runs_with_graphs_and_keeps_that_of_runs_without(both):
    both("sd3", "--perf-dump-path", "perf.json")
    with_graphs = json.loads(Path("perf.json").read_text())["fingerprint"]["fields"]
    assert with_graphs["cuda_graphs"] is True


@pytest.mark.whole
@pytest.mark.parametrize(
    ("graphs", "warmup", "peak"), [("true", True, 900), ("true", False, 900), ("false", True, 500)]
)
def test_the_peak_of_a_run_with_graphs_holds_what_its_replays_compute_in(
    pipelines, sglang, recorders, monkeypatch, graphs, warmup, peak
):
    """A GPU that allocates 500 MB in any stage, and 400 more in one that records a graph."""
    counted = []

    class Allocating(Memory):
        def checkpoint(self) -> Checkpoint:
            recorded = sum(len(recorder.shapes) for recorder in recorders)
            new, counted[:] = recorded - sum(counted), [recorded]
            return Checkpoint(400, 600, 900 if new else 500, 1000, 50)

    monkeypatch.setattr(rank, "Memory", Allocating)
    words = (f"compile.cuda_graphs={graphs}", "--perf-dump-path", "perf.json", *(["--warmup"] if warmup else []))
    done = runner(pipelines, sglang)("sd3", *words, "--backend", "sglang", steps=1)
    assert done.code == 0, done.err
    found = json.loads(Path("perf.json").read_text())
    peaks = {stage: each["peak_allocated_mb"] for stage, each in found["memory_checkpoints"].items()}
    assert peaks == dict.fromkeys(peaks, 500) | {"denoising": peak}
    assert found["memory_checkpoints"]["denoising"]["allocated_mb"] == 400
    assert [each["peak_allocated_mb"] for each in found["ranks"]] == [peak]


@pytest.mark.whole
def test_the_fingerprint_of_a_run_without_graphs_has_no_such_field(pipelines, sglang):
    assert runner(pipelines, sglang)("sd3", "--perf-dump-path", "perf.json", steps=1).code == 0
    assert "cuda_graphs" not in json.loads(Path("perf.json").read_text())["fingerprint"]["fields"]


def test_a_run_on_the_cpu_and_one_on_diffusers_refuse_graphs(pipelines, sglang):
    run = runner(pipelines, sglang)
    done = run("sd3", "compile=graphs", "device=cpu")
    assert done.code == 2
    assert done.lines[-1].endswith("compile.cuda_graphs needs a GPU, and this run computes on the CPU; leave it out")
    done = run("sd3", "compile=graphs", "--backend", "diffusers")
    assert done.code == 2
    assert "compile.cuda_graphs is supported only by the native engine" in done.lines[-1]


@dataclass(frozen=True)
class Conditioning:
    text: Tensor
    tables: tuple[Tensor, Tensor]
    rows: list[list[Tensor]]


class Little(torch.nn.Module):
    def evaluate(self, latents: Tensor, c: Conditioning) -> Tensor:
        return latents * c.text + c.tables[0] - c.tables[1] * c.rows[0][0] + c.rows[0][1]


def conditioning(seed: int, size: int = 3) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    text, *tables, first, second = (torch.randn(size, generator=generator) for _ in range(5))
    return Conditioning(text, (tables[0], tables[1]), [[first, second]])


@pytest.fixture
def copied(monkeypatch) -> list[int]:
    """How many tensors each evaluation copies into the buffers of its graph."""
    counts: list[int] = []
    copy = torch._foreach_copy_

    def noted(buffers, given):
        counts.append(len(buffers))
        return copy(buffers, given)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    return counts


def test_only_tensors_that_are_others_than_last_time_or_were_changed_are_copied(recorders, copied):
    network, plain, first = Little(), Little(), conditioning(1)
    cuda_graphs.Graphs(network)
    latents = torch.ones(3)

    def check(latents: Tensor, c: Conditioning, count: int) -> None:
        copied.clear()
        assert torch.equal(network.evaluate(latents, c), plain.evaluate(latents, c))
        assert sum(copied) == count

    check(latents, first, 6)
    check(latents, first, 0)
    check(2 * latents, first, 1)
    check(latents, Conditioning(first.text.clone(), first.tables, first.rows), 2)
    first.tables[1].mul_(2)
    check(latents, first, 2)  # the text is the first again
    first.rows[0][0].data = torch.full((3,), 5.0)
    check(latents, first, 1)
    check(latents, conditioning(2), 5)
    check(latents, first, 5)
    assert recorders[0].shapes == [(3,)]
    check(torch.ones(4), conditioning(3, 4), 6)
    check(latents, first, 0)
    assert recorders[0].shapes == [(3,), (4,)]


def test_the_numbers_of_a_tensor_that_is_gone_are_not_taken_for_those_of_its_successor(recorders):
    network, plain, c = Little(), Little(), conditioning(1)
    cuda_graphs.Graphs(network)
    for value in range(20):  # the allocator gives most of them the same address
        latents = torch.full((3,), float(value))
        assert torch.equal(network.evaluate(latents, c), plain.evaluate(latents, c))
        del latents


def test_a_result_stays_when_the_next_evaluation_is_replayed(recorders):
    network, c = Little(), conditioning(1)
    cuda_graphs.Graphs(network)
    first = network.evaluate(torch.zeros(3), c)
    kept = first.clone()
    network.evaluate(torch.ones(3), c)
    assert torch.equal(first, kept)


class Failing:
    """torch.cuda of a machine whose capture ends as `error` says."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        try:
            raise self.error
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


class Stream:
    def wait_stream(self, _: object) -> None:
        return None


@pytest.fixture
def failing(monkeypatch):
    def fail(error: Exception) -> None:
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Failing(error))

    return fail


def test_an_evaluation_that_cannot_be_captured_is_an_error_in_one_sentence(failing, pipelines, sglang, monkeypatch):
    monkeypatch.setattr(make, "CAPTURING", ("cuda", "cpu"))
    failing(RuntimeError("operation not permitted when stream is capturing\nSearch for it"))
    done = runner(pipelines, sglang)("sd3", "compile.cuda_graphs=true", "--backend", "sglang")
    assert done.code == 1
    assert done.lines[-1].endswith(
        "compile.cuda_graphs: this network cannot be captured into a CUDA graph "
        "(--log-level debug shows why); leave it out"
    )


def test_memory_that_runs_out_during_a_capture_is_said_as_ever(failing, pipelines, sglang, monkeypatch):
    monkeypatch.setattr(make, "CAPTURING", ("cuda", "cpu"))
    failing(torch.OutOfMemoryError("CUDA out of memory"))
    done = runner(pipelines, sglang)("sd3", "compile.cuda_graphs=true", "--backend", "sglang")
    assert (done.code, "Out of memory while generating" in done.lines[-1]) == (1, True), done.err


def test_an_evaluation_is_tried_before_it_is_captured(failing):
    failing(RuntimeError("no"))
    calls = []
    with pytest.raises(RunError, match=r"cannot be captured into a CUDA graph \(--log-level debug"):
        cuda_graphs.Recorder().record(lambda: calls.append(1))
    assert len(calls) == cuda_graphs.WARMUP + 1
