"""The one function that builds a denoising network: its steps for a plan, and the copy on meta."""

import json
from pathlib import Path

import pytest
import torch
from whole import plan_of

from sglang_gen.backends.native.build import build, steps
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Layout
from sglang_gen.weights.load import slots

COMMON = {
    "create": "create", "layers": "keep_linear_layers", "checkpoint": "check_checkpoint",
    "channels": "keep_all_channels", "tensors": "load_tensors", "memory": "keep_memory_format",
    "collectives": "add_nothing", "sequence": "keep_sequence", "kernel": "choose_kernel", "products": "torch_products",
    "residency": "stay_resident",
    "cache": "compute_every_step", "blocks": "run_blocks", "compile": "run_eagerly", "graphs": "launch_kernels",
}  # fmt: skip
TENSOR_PARALLEL = {"channels": "shrink", "collectives": "add_collectives"}
META = {"checkpoint": "no_checkpoint", "tensors": "stay_on_meta"}
PLANS = {
    "one process": ((), Layout(), False, {}),
    "half precision, compiled": (
        ("dtype=bfloat16", "compile=regional"), Layout(), False,
        {"memory": "channels_last", "compile": "compile_network"},
    ),
    "tensor parallel": (("parallel=tp2",), Layout(tp=2), False, TENSOR_PARALLEL),
    "both kinds of parallelism, timed": (
        ("parallel=sp2_tp2", "perf.blocks=true"), Layout(ulysses=2, tp=2), False,
        {**TENSOR_PARALLEL, "sequence": "split_sequence", "blocks": "time_blocks"},
    ),
    "CUDA graphs": (
        ("compile=regional",), Layout(), False,
        {"memory": "channels_last", "compile": "compile_network", "graphs": "capture_graphs"},
    ),
    "step cache": (
        ("cache=dbcache", "cache.Fn_compute_blocks=1"), Layout(), False, {"cache": "cache_steps"},
    ),
    "oneDNN": (("backend.float32_matmul=onednn",), Layout(), False, {"products": "onednn_products"}),
    "a copy on meta": (
        ("dtype=bfloat16", "compile=regional", "parallel=tp2", "perf.blocks=true"), Layout(tp=2), True,
        {**TENSOR_PARALLEL, **META},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_chooses_every_step(pipelines, name):
    words, layout, meta, chosen = PLANS[name]
    plan = plan_of(f"model.path={pipelines['sd3']}", "sampling.prompt=a", *words)
    plan.run.compile.cuda_graphs = name == "CUDA graphs"  # a plan without a GPU refuses them
    assert [step.__name__ for step in steps(plan, Mesh(layout), meta)] == [*{**COMMON, **chosen}.values()]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)])
@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_the_copy_on_meta_has_the_modules_and_tensors_of_the_network(pipelines, name, layout):
    plan, mesh = plan_of(f"model.path={pipelines[name]}", "sampling.prompt=a", "dtype=bfloat16"), Mesh(layout, 0)
    network, copy = build(plan, mesh).network, build(plan, mesh, meta=True).network
    assert str(network) == str(copy)
    assert [(slot.name, slot.shape) for slot in slots(network)] == [(slot.name, slot.shape) for slot in slots(copy)]
    for one, other in zip(network.parameters(), copy.parameters(), strict=True):
        assert (one.dtype, one.device.type, other.dtype, other.is_meta) == (torch.bfloat16, "cpu", torch.bfloat16, True)


def blocks_of(name: str) -> list[dict]:
    return json.loads(Path(name).read_text())["block_timings_ms"]


BLOCKS = {
    "sd3": ["blocks.0", "blocks.1", "blocks.2"],
    "flux": ["blocks.0", "blocks.1", "single_blocks.0", "single_blocks.1"],
}
SMALL = ("--prompt", "a", "--seed", 1, "--height", 32, "--width", 32, "--num-inference-steps", 3)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "flux", "sd15"])
def test_every_block_of_the_timed_generation_is_timed(pipelines, sglang, name):
    words = ("--model-path", pipelines[name], *SMALL, "--guidance-scale", 1, "--warmup", "perf=light", "perf.repeat=2")
    assert sglang("generate", *words, "--perf-dump-path", "without.json").code == 0
    done = sglang("generate", *words, "perf.blocks=true", "--perf-dump-path", "with.json")
    assert done.code == 0, done.err
    assert blocks_of("without.json") is None
    rows = blocks_of("with.json")
    names = [row["name"] for row in rows]
    if name == "sd15":
        assert names[0] == "down.0.residuals.0"
        assert "down.0.downsample" in names
        assert names[-1].startswith("up.")
    else:
        assert names == BLOCKS[name]
    assert len(set(names)) == len(names)
    calls = 4 if name == "sd15" else 3  # PNDM evaluates the network twice in its first step
    assert {row["calls"] for row in rows} == {calls}
    assert all(row["total_ms"] == pytest.approx(calls * row["mean_ms"]) for row in rows)
    step = json.loads(Path("with.json").read_text())["denoise_steps_ms"]
    assert 0 < sum(row["total_ms"] for row in rows) < sum(each["duration_ms"] for each in step)


@pytest.mark.whole
@pytest.mark.parametrize("layout", ["tp2", "ring2"])
def test_ranks_time_their_blocks_too(run_on_ranks, layout):
    done = run_on_ranks("flux", f"parallel={layout}", "perf.blocks=true", "--perf-dump-path", "dump.json")
    assert done.code == 0, done.err
    assert [row["name"] for row in blocks_of("dump.json")] == BLOCKS["flux"]


REFUSED = "perf.blocks times each block of the network, and "


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("compile=full",), REFUSED + "compile=full compiles all of them at once"),
        (("compile=graphs",), REFUSED + "compile.cuda_graphs replays all of them at once"),
        (("--backend", "diffusers"), "perf.blocks is supported only by the native engine"),
    ],
)
def test_blocks_that_do_not_run_one_by_one_are_not_timed(pipelines, sglang, words, sentence):
    done = sglang("generate", "--model-path", pipelines["sd3"], *SMALL, "perf.blocks=true", "dry_run=true", *words)
    assert done.code == 2
    assert sentence in done.lines[-1]
