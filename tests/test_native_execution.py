"""Kernels and compiled blocks of the native engine, as a user meets them."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import mostly_slow
from on_meta import on_meta
from PIL import Image
from safetensors.numpy import load_file
from torch import nn
from whole import plan_of

from sglang_gen import log
from sglang_gen.backends.diffusers import engine as diffusers
from sglang_gen.backends.native import engine as native
from sglang_gen.engine import attention_autotune, onednn_attention
from sglang_gen.engine import compile as compiling
from sglang_gen.engine.meta_trace import Shapes, trace_on_meta
from sglang_gen.errors import RunError
from sglang_gen.models.attention import Attend
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sequence_boundary import Sharding
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.perf.clock import Clock, timer
from sglang_gen.perf.flops import CallLog
from sglang_gen.perf.memory import Memory


@pytest.fixture
def run(pipelines, sglang):
    def generate(name, *words: object, folder: str = "outputs", dtype: str = "float32"):
        return sglang("generate", "--model-path", pipelines[name], "--prompt", "a cat", "--seed", "7", "--dtype",
                      dtype, "output.latents=true", "--backend", "sglang", "--output-path", folder, "--height", 32,
                      "--width", 48, "--num-inference-steps", 2, *words)  # fmt: skip

    return generate


def effective(folder: str, name: str) -> object:
    return json.loads(Path(f"{folder}/generated_image_0.json").read_text())["effective"][name]


def assert_close(one: str, other: str) -> None:
    a, b = (load_file(f"{folder}/generated_image_0.safetensors")["latents"] for folder in (one, other))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "flux", "sd15", "sdxl"])
def test_a_named_kernel_takes_the_place_of_sdpa(run, monkeypatch, name):
    used = []

    def noted(q, k, v):
        used.append(q.shape)
        return nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("sglang_gen.engine.attention_kernels.scaled_dot_product_attention", noted)
    done = run(name, "--attention-backend", "math", "--guidance-scale", "3", folder="math")
    assert done.code == 0, done.err
    assert effective("math", "attention") == "math"
    assert len(used) > 2
    assert run(name, "--guidance-scale", "3", folder="again").code == 0
    assert_close("math", "again")


@pytest.mark.whole
def test_auto_times_the_kernels_on_the_shapes_of_the_run_and_its_record_pins_the_answer(run, sglang, monkeypatch):
    asked = []

    def answer(kernels, shapes, device, dtype):
        asked.append((list(kernels), shapes))
        return "math"

    monkeypatch.setattr(attention_autotune, "fastest", answer)
    assert run("sd3", folder="float32").code == 0
    assert asked == []  # there torch's choice stays
    words = ("--guidance-scale", "3", "sampling.max_sequence_length=16")
    assert run("sd3", *words, dtype="bfloat16").code == 0
    ((names, shapes),) = asked
    assert names == ["sdpa", "math", *(["onednn"] if onednn_attention.runs(torch.bfloat16) else [])]
    assert {shape[0] for shape in shapes} == {2}  # both branches in one batch
    assert effective("outputs", "attention") == "math"
    done = sglang("generate", "--config", "outputs/generated_image_0.json", "--output-path", "repeated")
    assert done.code == 0, done.err
    assert len(asked) == 1
    assert effective("repeated", "attention") == "math"
    first, again = (np.asarray(Image.open(f"{folder}/generated_image_0.png")) for folder in ("outputs", "repeated"))
    assert np.array_equal(first, again)


def engine_of(pipelines, name: str, *words: str, backend: Any = native):
    """A loaded engine, a function that generates its first batch, and the calls that it notes."""
    planned = plan_of(f"model.path={pipelines[name]}", "sampling.prompt=a cat", *words)
    calls = CallLog()
    log.setup("error")
    engine = backend.load(planned, Mesh(), calls)
    return engine, partial(engine.sample, planned.batches[0], 2, Clock(timer("cpu"), Memory("cpu"))), calls


@pytest.mark.whole
def test_the_kernel_that_auto_chooses_is_known_before_the_first_batch(pipelines, monkeypatch):
    asked = []
    monkeypatch.setattr(attention_autotune, "fastest", lambda kernels, shapes, *_: asked.append(shapes) or "math")
    engine, generate, _ = engine_of(pipelines, "sd3", "dtype=bfloat16", "sampling.guidance_scale=3")
    before = engine.effective()
    assert before["attention"] == "math"
    generate()
    assert engine.effective() == before
    (shapes,) = asked
    met: Counter[tuple[int, ...]] = Counter()

    def kernel(q, k, v):
        met.update([(*q.shape[:3], k.shape[2], q.shape[3])])
        return nn.functional.scaled_dot_product_attention(q, k, v)

    engine.execution.parallel_network.set_kernel(kernel, None)
    generate()
    assert met == Counter({shape: 2 * count for shape, count in shapes.items()})  # the times are those of one step


@pytest.mark.parametrize("backend", [native, diffusers])
def test_calls_are_noted_where_they_are_made_and_no_network_has_another_method_for_it(pipelines, backend):
    words = ("backend=diffusers",) if backend is diffusers else ()
    engine, generate, calls = engine_of(pipelines, "sd3", *words, backend=backend)
    generate()
    assert not calls.calls  # only the timed generation is noted
    calls.on = True
    generate()
    noted = Counter((call.network.stage, call.network.name, call.method) for call in calls.calls.values())
    expected = {("denoising", "transformer", "forward"), ("decoding", "vae", "decode")}
    expected |= {("text_encoding", name, "forward") for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    expected |= {("denoising", "transformer", "condition")} if backend is native else set()
    assert noted.keys() == expected
    vae, network = (
        (engine.components["vae"], engine.network)
        if backend is native
        else (engine.pipeline.vae, engine.pipeline.transformer)
    )
    for module in (vae, network):
        assert not {"forward", "condition", "decode", "encode"} & vars(module).keys()


@pytest.mark.whole
def test_the_dump_of_a_record_with_named_settings_of_sdpa_keeps_them(run, sglang):
    assert run("sd3", "attention.backend_config={priority: [math]}").code == 0
    assert effective("outputs", "attention") == "sdpa(math)"
    done = sglang("generate", "--config", "outputs/generated_image_0.json", "--output-path", "repeated")
    assert done.code == 0, done.err
    assert effective("repeated", "attention") == "sdpa(math)"


def test_a_kernel_that_does_not_run_here_is_refused_by_name(run):
    done = run("sd3", "--attention-backend", "cudnn")
    assert done.code == 2
    assert "attention.backend: 'cudnn' does not run here; legal: auto, sdpa, flash, math, onednn, flex" in done.err
    done = run("sd3", "--attention-backend", "xformers")
    assert done.code == 2
    assert "the native engine has no kernel 'xformers' (legal here: auto, sdpa, flash, math, onednn, flex)" in done.err


def test_settings_of_flex_that_do_not_fit_are_refused_before_anything_is_computed(run):
    done = run("sd3", "attention=flex", "attention.backend_config={window: -1}")
    assert (done.code, "'window' is a whole number of at least 0, not -1" in done.err) == (2, True)
    assert "Generating with prompt" not in done.err


class Little(nn.Module):
    def __init__(self, config: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.Linear(config, config) for _ in range(3))
        self.last = nn.Linear(config, 2)
        self.attend = Attend()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        x = self.attend(x[:, None], x[:, None], x[:, None])[:, 0]
        return self.last(x)


def test_a_rehearsal_finds_the_distinct_calls_without_computing():
    unsplit = Sharding(dim=1, unit=int, attention_ops=lambda network: {}, tokens=dict, shard_conditioning=tuple)
    meta_copy = on_meta(Split(Mesh(), {}, unsplit), lambda: Little(4), torch.float32)
    found = trace_on_meta(meta_copy, (nn.Linear,), lambda network: network(torch.empty(2, 5, 4, device="meta")))
    assert found.attention == {(2, 1, 5, 5, 4): 1}
    calls = {
        (tuple((shape, torch.float32) for shape in weights), ((2, 5, 4),))
        for weights in (((4, 4), (4,)), ((2, 4), (2,)))
    }
    assert found.blocks == {nn.Linear: calls}


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def test_repeats_of_a_block_share_a_graph_and_an_unexpected_shape_is_an_error(traced):
    network = nn.Sequential(*(Doubling() for _ in range(4)))
    compiled = compiling.Compiled(network, (Doubling,), "cpu")
    compiled.expect(Shapes(blocks={Doubling: {"one", "two"}}))
    with compiled.limited():
        network(torch.ones(3))
        network(torch.ones(4))
    assert len(traced) == 2
    with pytest.raises(RunError, match="a block was compiled for more than the 2 expected shapes"), compiled.limited():
        network(torch.ones(5))


class Tripling(nn.Module):
    def forward(self, x):
        return 3 * x


def test_each_class_of_blocks_has_its_own_limit(traced):
    network = nn.Sequential(Doubling(), Tripling())
    compiled = compiling.Compiled(network, (Doubling, Tripling), "cpu")
    compiled.expect(Shapes(blocks={Doubling: {"one", "two", "three"}, Tripling: {"one"}}))
    before = torch._dynamo.config.recompile_limit
    with compiled.limited():
        for size in (3, 4, 5):
            network[0](torch.ones(size))
        network[1](torch.ones(3))
    with pytest.raises(RunError, match="a block was compiled for more than the 1 expected shapes"), compiled.limited():
        network[1](torch.ones(4))
    assert len(traced) == 4
    assert torch._dynamo.config.recompile_limit == before


def test_graphs_of_a_later_batch_are_allowed_beside_those_of_the_first(traced):
    network = nn.Sequential(Doubling())
    compiled = compiling.Compiled(network, (Doubling,), "cpu")
    for call, size in (("one", 3), ("two", 4), ("one", 3)):
        compiled.expect(Shapes(blocks={Doubling: {call}}))
        with compiled.limited():
            network(torch.ones(size))
    assert len(traced) == 2


def test_compilation_without_a_compiler_is_refused(run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for words in (("compile=regional",), ("attention=flex",)):
        done = run("sd3", *words)
        assert done.code == 2
        assert "needs a C++ compiler" in done.err


@pytest.mark.parametrize("name", mostly_slow(["sd3", "flux", "sdxl", "sd15"], "sdxl"))
@pytest.mark.parametrize("regional", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_the_graphs_of_a_network_are_as_many_as_expected(run, traced, name, regional):
    assert run(name, folder="eager").code == 0
    done = run(name, "--enable-torch-compile", f"compile.regional={regional}", folder="compiled")
    assert done.code == 0, done.err
    assert effective("compiled", "compile") == ("regional" if regional == "true" else "full")
    assert_close("compiled", "eager")
    assert len(traced) == 1 if regional == "false" else len(traced) > 1


@pytest.mark.slow
def test_what_a_run_compiled_counts_against_no_later_run_of_its_process(run, traced):
    for rows in (1, 2):
        done = run("sd3", "compile=regional", "--num-samples", rows, f"sampling.batch_size={rows}")
        assert done.code == 0, done.err
    assert len(traced) >= 2


@pytest.mark.slow
def test_batches_of_two_sizes_are_compiled_each(run, traced):
    done = run("sd3", "compile=regional", "--num-samples", "3", "sampling.batch_size=2", "compile.warmup=false")
    assert done.code == 0, done.err
    alone = len(traced)
    assert run("sd3", "compile=regional", "compile.warmup=false").code == 0
    assert alone == 2 * (len(traced) - alone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_compiled_blocks_give_the_same_picture_and_a_second_process_finds_them_on_disk(
    run, monkeypatch, tmp_path, name
):
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert run(name, folder="eager").code == 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert run(name, "compile=regional", folder="compiled").code == 0
    assert_close("compiled", "eager")
    missed = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]
    assert missed > 1
    assert (tmp_path / "cache" / "compile").is_dir()
    torch._dynamo.reset()  # as a new process
    torch._dynamo.utils.counters.clear()
    assert run(name, "compile=regional", folder="again").code == 0
    counters = torch._dynamo.utils.counters
    found = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    assert found >= missed
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


@pytest.mark.slow
def test_steps_with_and_without_guidance_are_compiled_each(run, traced):
    words = ("--guidance-scale", "3", "compile.warmup=false")
    assert run("sd3", *words, folder="eager").code == 0
    assert run("sd3", *words, "compile=regional", folder="compiled").code == 0
    alone = len(traced)
    torch._dynamo.reset()
    done = run("sd3", *words, "compile=regional", "sampling.guidance_interval=[0, 0.5]", folder="half")
    assert done.code == 0, done.err
    assert len(traced) - alone == 2 * alone
