"""What a run is predicted to hold, send, compute and take: the traces, the rates, and the dump beside measurements."""

import errno
import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import rehearsed
import torch
from reference import Reference

from sglang_gen import env
from sglang_gen.backends.native import vae_parallel
from sglang_gen.backends.native.build import build
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.dry_run import held_weights, machine_rates, rate_measurement
from sglang_gen.dry_run import predictions as dry_predictions
from sglang_gen.dry_run.heap import FIRST_THRESHOLD, Heap
from sglang_gen.dry_run.live_memory import RETURNED, Alive, workspace_on
from sglang_gen.dry_run.machine_rates import Rates, at
from sglang_gen.dry_run.roofline import Kernels
from sglang_gen.dry_run.traces import trace_decoding, trace_text_encoder
from sglang_gen.engine import freed_memory
from sglang_gen.engine.attention_memory import held_bytes
from sglang_gen.families import autoencoder, registry
from sglang_gen.families.contract import Request
from sglang_gen.hub import component_classes, resolve
from sglang_gen.launch.rank import BACKENDS
from sglang_gen.models.vae import Autoencoder
from sglang_gen.parallel.collectives import Axis, Traffic
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.plan.make import make_plan
from sglang_gen.types import Layout, Size
from tools import predictions

pytestmark = pytest.mark.usefixtures("predictions")
KINDS = ("attention sdpa", "attention math", "attention onednn", "product torch", "product onednn", "convolution",
         "move", "copy", "activation", "norm")  # fmt: skip
MIB = 2**20


def rates(ranks: int = 1, seconds: float = 1e-3, **changes: object) -> Rates:
    """Every kernel and collective takes so long, however small or large it is up to 10^12 FLOPs or bytes."""
    flat = [(1.0, seconds), (1e12, seconds)]
    collectives = dict.fromkeys(("all_reduce", "all_gather", "all_to_all"), flat) if ranks > 1 else {}
    between = (collectives, collectives, (seconds, 2 * seconds))
    shape_mb = {"product torch": 0.75, "product onednn": 0.5, "convolution": 0.25}
    kept = (shape_mb, dict.fromkeys(shape_mb, 0.0))
    found = Rates("2026-01-02T03:04:05+00:00", 1, ranks, 0.0, 5.0, *kept, dict.fromkeys(KINDS, flat), *between)
    return replace(found, **changes)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """`sglang perf rates` measures nothing, into an empty cache."""
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "rates"))
    monkeypatch.setattr(rate_measurement, "measure", lambda ranks, threads, device, dtype: rates(ranks))


@pytest.fixture
def dump(sglang):
    def run(model: Path, *words: str) -> dict:
        always = ("--prompt", "a", "--height", 32, "--width", 32, "--num-inference-steps", 2, "--seed", 7, "--dtype",
                  "float32", "perf.machine_rates=false", "--perf-dump-path", "p.json")  # fmt: skip
        done = sglang("generate", "--model-path", model, *always, *words)
        assert done.code == 0, done.err
        return json.loads(Path("p.json").read_text())

    return run


# Memory


def test_math_holds_the_scores_of_all_tokens_and_fused_kernels_hold_none():
    card = rehearsed.card_of("flux", Reference("flux").variants["dev"])
    fused, math = (
        rehearsed.rank("flux", card, Layout(), 0, 512, 512, text_length=8, attention=name) for name in ("sdpa", "math")
    )
    tokens, heads = 32 * 32 + 8, 2
    scores = heads * tokens**2 * 4
    assert fused.alive < scores < 2 * scores < math.alive
    assert math.flops == fused.flops


def test_a_kernel_of_onednn_holds_copies_and_a_block_of_scores():
    q, k = torch.empty(1, 2, 4096, 64, dtype=torch.bfloat16), torch.empty(1, 2, 512, 64, dtype=torch.bfloat16)
    copies = 4 * (q.numel() + k.numel()) + 2 * k.numel()
    assert held_bytes("onednn", q, k, k) == copies + 2 * 4 * 1024 * 512
    assert held_bytes("sdpa", q, k, k) == 4 * 2 * 4096
    assert held_bytes("math", q, k, k) == 4 * (2 * 2 * 4096 * 512 + q.numel() + 2 * k.numel())


@pytest.mark.whole
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decoding_four_million_pixels_holds_a_few_of_the_widest_maps(device):
    card = resolve.read_card(env.preset_configs("sdxl"), "sdxl", weights=False)
    request = Request(Size(2048, 2048), rehearsed.FACTOR, steps=1, guidance=1.0, text_length=None)
    found = trace_decoding(rehearsed.FAMILIES["sdxl"], Axis("sp", 1, 0), card, request, 1, torch.bfloat16, device)
    widest = 256 * 2048 * 2048 * 2  # bytes after the last upsampling
    scores = (256 * 256) ** 2 * 4  # bytes in the attention in the middle, in float32
    assert 3 * widest <= found.alive < 4.2 * widest < scores
    assert sum(found.kernels.attention.values()) == 1


@pytest.mark.parametrize(
    ("channels_last", "dtype", "size", "copies"),
    [
        (False, torch.float32, 3, 4 * 16 * 16 * 16),  # the result, which is larger than input and weight
        (False, torch.float32, 1, 0),
        (False, torch.bfloat16, 1, 2 * 8 * 16 * 16 + 4 * 16 * 16 * 16),  # input, and sums in float32
        (True, torch.bfloat16, 3, 2 * 16 * 8 * 9),
    ],
)
def test_a_convolution_on_a_cpu_holds_what_onednn_copies(channels_last, dtype, size, copies):
    with torch.device("meta"):
        x, weight = torch.empty(1, 8, 16, 16, dtype=dtype), torch.empty(16, 8, size, size, dtype=dtype)
    plain, own = Alive([x, weight]), Alive([x, weight], workspace_on("cpu", channels_last))
    for alive in (plain, own):
        with alive:
            torch.nn.functional.conv2d(x, weight, padding=size // 2)
    assert own.most - plain.most == copies
    assert own.now == plain.now == 0
    assert workspace_on("cuda", channels_last)(torch.ops.aten.convolution.default, (x, weight), x) == 0


def test_a_heap_keeps_what_lies_below_a_block_in_use_and_returns_its_top_and_mapped_blocks():
    heap = Heap()
    assert heap.replay([(1, 100 * MIB), (1, None)]) >= 100 * MIB
    assert heap.held == 0  # larger than any block of the heap, so it was mapped
    heap.replay([(2, 20 * MIB), (2, None)])
    assert heap.threshold >= 20 * MIB
    most = heap.replay([(3, 8 * MIB), (4, MIB), (3, None), (5, 9 * MIB)])
    assert 18 * MIB <= most < 19 * MIB  # the hole of block 3 is too small for block 5
    heap.replay([(6, 8 * MIB)])
    assert heap.held < 19 * MIB  # and holds block 6
    heap.replay([(6, None), RETURNED])
    assert 10 * MIB <= heap.held < 10 * MIB + FIRST_THRESHOLD


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_text_encoders_are_traced_as_torch_runs_them(pipelines, name):
    plan = planned(pipelines[name], "float32")
    encoders = [part for part in plan.card.components if part.startswith("text_encoder")]
    for part in encoders:
        found = trace_text_encoder(plan, part, Axis("tp", 1, 0), rows=2, length=16)
        assert found.kernels.flops > 0
        assert found.alive > 0
        assert found.kernels.attention  # and no product of scores


def planned(model: Path, dtype: str, backend: str = "sglang"):
    run = compose(Choices((f"model.path={model}", "sampling.prompt=a", f"dtype={dtype}", f"backend={backend}")))
    return make_plan(run, resolve.find(run.run.model, weights=True))


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_weights_stay_in_mapped_files_if_nothing_copies_them(pipelines, name):
    found = {}
    for dtype in ("float32", "bfloat16"):
        plan = planned(pipelines[name], dtype)
        spec = registry.by_pipeline_class(plan.pipeline_class)
        built = build(plan, Mesh(), meta=True)
        tensors = [*built.network.parameters(), *built.network.buffers()]
        whole = held_weights.weights_of(plan, spec, {built.name: sum(tensor.nbytes for tensor in tensors)})
        found[dtype] = held_weights.mapped_of(plan, spec, {built.name: built})
    assert found["bfloat16"] == {}  # the tiny pipelines are stored in float32
    assert 0 < found["float32"][built.name] < sum(tensor.numel() * 4 for tensor in tensors)
    assert found["float32"].keys() == whole.keys()


# Rates


def test_a_curve_is_flat_below_its_points_and_linear_above_them():
    curve = [(10.0, 1.0), (1000.0, 4.0)]
    assert [at(curve, work) for work in (1, 10, 1000, 5000)] == [1.0, 1.0, 4.0, 20.0]
    assert at(curve, 100) == pytest.approx(2.0)


def test_a_product_takes_the_longer_of_its_arithmetic_and_its_bytes_and_each_kernel_its_launch():
    curves = {kind: [(1.0, 0.0)] for kind in KINDS} | {"product onednn": [(100.0, 1.0)], "copy": [(10.0, 1.0)]}
    curves |= {"move": [(10.0, 2.0)], "convolution": [(10.0, 1.0)], "attention math": [(10.0, 3.0)]}
    kernels = Kernels(fused=False)
    kernels.products.update({(200, 10): 2, (100, 50): 1})
    kernels.convolutions[20, 1] = 1
    kernels.attention[10, 1] = 1
    kernels.others["move", 20] = 1
    found = rates(curves=curves, launch_us=1e6 / 2).parts(kernels, "math", "onednn")
    assert found == {"products_ms": 2 * 2.5 + 5.5 + 2.5, "attention_ms": 3.5, "elementwise_ms": 4.5}


def test_libraries_keep_memory_for_each_shape_of_the_kernel_that_computes_it():
    found = rates()
    assert found.libraries_mb(10, 4, "torch") == 5.0 + 10 * 0.75 + 4 * 0.25
    assert found.libraries_mb(10, 4, "onednn") == 5.0 + 10 * 0.5 + 4 * 0.25
    assert rates(shape_mb={}).libraries_mb(10, 4, "torch") == 5.0


def test_the_first_call_of_each_shape_takes_longer():
    found = rates(shape_s={"product torch": 0.5, "convolution": 0.25})
    assert found.first_calls_s(10, 4, "torch") == found.first_calls_s(10, 4, "onednn") == 10 * 0.5 + 4 * 0.25
    assert rates().first_calls_s(10, 4, "torch") == 0.0


def test_collectives_take_the_time_of_their_mean_size_and_of_what_is_computed_before_them():
    sent = Traffic({"all_reduce tp": 4}, {"all_reduce tp": 4000})
    found = rates(ranks=2, collectives={"all_reduce": [(100.0, 1.0), (1000.0, 3.0)]},
                  later={"all_reduce": [(100.0, 2.0), (1000.0, 5.0)]}, between_s=(0.5, 1.5))  # fmt: skip
    expected = {0.0: 12.0, 4 * 0.5: 12.0, 4 * 1.0: 16.0, 4 * 1.5: 20.0, 100.0: 20.0}
    assert {computing: found.seconds_between_ranks(sent, computing) for computing in expected} == expected
    assert rates(ranks=1).seconds_between_ranks(sent, 1.0) is None
    assert rates(ranks=1).seconds_between_ranks(Traffic(), 1.0) == 0


def test_rates_are_kept_for_each_dtype_and_number_of_ranks_and_a_broken_file_counts_as_none(tmp_path):
    path = tmp_path / "machine" / "rates.json"
    assert machine_rates.read(path) is None
    machine_rates.save(rates(), path)
    assert machine_rates.read(path) == rates()
    path.write_text('{"threads": 1}')
    assert machine_rates.read(path) is None
    names = {machine_rates.cache_file("cpu", dtype, ranks, 1) for dtype in ("float32", "bfloat16") for ranks in (1, 2)}
    assert len(names) == 4


def test_perf_rates_keeps_what_a_dry_run_then_predicts_with(sglang, measured):
    words = ("generate", "--prompt", "a", "--dtype", "float32", "--backend", "sglang", "dry_run=json")
    assert json.loads(sglang(*words).out)["estimate"]["prediction"] is None
    done = sglang("perf", "rates", "--dtype", "float32,bfloat16")
    assert done.code == 0, done.err
    assert [line.partition(",")[0] for line in done.out.splitlines()] == ["float32", "bfloat16"]
    found = json.loads(sglang(*words, "sampling.seed=2", "log_level=error").out)["estimate"]["prediction"]
    assert (found["machine"], found["measured_at"]) == ("this machine", "2026-01-02T03:04:05+00:00")
    assert found["step_ms"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--dtype", "float"), "--dtype is 'float'; did you mean 'float"),
        (("--ranks", "0"), "--ranks is 0 and this machine has"),
        (("--ranks", "many"), "sglang perf rates: argument --ranks: invalid int value"),
        (("--device", "tpu"), "--device is 'tpu'; it must be cpu or cuda"),
        (("--device", "cuda"), "and this machine has 0 GPUs"),
    ],
)
def test_rates_that_cannot_be_measured_are_refused(sglang, words, sentence):
    done = sglang("perf", "rates", *words)
    assert done.code == 2
    assert sentence in done.err


@pytest.mark.parametrize("blocked", ["file", "folder"])
def test_rates_that_cannot_be_kept_are_not_measured(sglang, monkeypatch, tmp_path, blocked):
    def measure(*_: object) -> Rates:
        raise AssertionError("measured")

    monkeypatch.setattr(rate_measurement, "measure", measure)
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))
    if blocked == "file":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.setattr(machine_rates, "cache_file", lambda *_: tmp_path)
    done = sglang("perf", "rates", "--dtype", "float32")
    assert (done.code, done.out) == (2, "")
    assert "The rates cannot be kept: " in done.err
    assert "cannot be written" in done.err


def test_rates_that_cannot_be_kept_after_all_are_shown(sglang, measured, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(machine_rates, "save", full)
    done = sglang("perf", "rates", "--dtype", "float32")
    assert done.code == 1
    assert done.out.startswith("float32, 1 rank of ")
    assert "kept in" not in done.out
    assert "No space left on device" in done.err


# The dump


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_a_dump_has_each_prediction_beside_its_measurement(dump, pipelines, measured, sglang, monkeypatch, name):
    assert sglang("perf", "rates", "--dtype", "float32").code == 0
    found = dump(pipelines[name], "--num-samples", "3", "sampling.batch_size=2", "--backend", "sglang")
    predicted = found["predicted"]
    assert found["ranks"][0]["predicted"] == predicted
    assert predicted["flops"]["ratio"] == 1
    assert predicted["flops"]["measured"] == sum(stage["flops"] for stage in found["work"].values())
    assert predicted["rates"]["measured_at"] == "2026-01-02T03:04:05+00:00"
    memory = predicted["memory_mb"]
    assert memory["measured"] == found["ranks"][0]["peak_host_anon_mb"]
    assert memory["process"] == found["ranks"][0]["host_anon_loading_mb"]
    shapes = (memory["libraries"] - 5.0) / 0.25  # a product counts as two or three convolutions
    assert shapes == int(shapes) > 8
    parts = memory["process"] + memory["libraries"] + memory["weights"] + max(memory["stages"].values())
    assert memory["predicted"] == pytest.approx(parts, abs=0.05)
    for quantity in ("memory_mb", "step_ms", "total_ms"):
        entry = predicted[quantity]
        assert entry["ratio"] == pytest.approx(entry["measured"] / entry["predicted"], rel=1e-3)
    assert predicted["total_ms"]["predicted"] > 4 * predicted["step_ms"]["predicted"] > 0
    slow = dict.fromkeys(("product torch", "product onednn", "convolution"), 60.0)
    monkeypatch.setattr(rate_measurement, "measure", lambda ranks, threads, device, dtype: rates(ranks, shape_s=slow))
    assert sglang("perf", "rates", "--dtype", "float32").code == 0
    words = ("--num-samples", "3", "sampling.batch_size=2", "--backend", "sglang")
    later = dump(pipelines[name], *words)["predicted"]["total_ms"]["predicted"] - predicted["total_ms"]["predicted"]
    assert later % 60e3 == pytest.approx(0, abs=0.1)  # the first call of every shape took a minute, once in the run
    assert 8 < later / 60e3 <= shapes


def test_without_rates_a_dump_says_how_to_measure_them(dump, pipelines, monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "empty"))
    found = dump(pipelines["sd3"], "--backend", "sglang")["predicted"]
    reason = "not measured on this machine: run sglang perf rates --dtype float32"
    for quantity in ("step_ms", "total_ms"):
        entry = found[quantity]
        assert (entry["predicted"], entry["ratio"], entry["reason"]) == (None, None, reason)
        assert entry["measured"] > 0
    assert found["memory_mb"]["predicted"] > 0
    assert "reason" in found["rates"]


@pytest.mark.whole
def test_the_diffusers_backend_has_measurements_and_a_reason_without_predictions(dump, pipelines):
    found = dump(pipelines["sd15"], "--backend", "diffusers")["predicted"]
    assert found["rates"] is None
    for quantity in ("memory_mb", "communication_bytes", "flops", "step_ms", "total_ms"):
        assert found[quantity]["predicted"] is None
        assert found[quantity]["measured"] is not None
        assert found[quantity]["reason"] == "only batches on the native engine are predicted"


def test_a_dump_without_counted_work_has_no_predictions(dump, pipelines):
    assert dump(pipelines["sd15"], "perf.work=false")["predicted"] is None


@pytest.mark.parametrize("layout", ["tp2", "sp2", "dp2"])
def test_every_rank_predicts_its_own(run_on_ranks, monkeypatch, tmp_path, layout):
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "empty"))
    done = run_on_ranks("sd3", f"parallel={layout}", "--num-samples", 2, "perf.machine_rates=false", "--backend",
                        "sglang", "--perf-dump-path", "p.json")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(Path("p.json").read_text())
    assert len(found["ranks"]) == 2
    for rank in found["ranks"]:
        predicted = rank["predicted"]
        assert predicted["flops"]["ratio"] == 1
        assert predicted["memory_mb"]["predicted"] > predicted["memory_mb"]["process"]
        if layout == "dp2":
            assert predicted["communication_bytes"]["predicted"] == predicted["communication_bytes"]["measured"] == 0
        else:
            assert predicted["communication_bytes"]["ratio"] == 1
        reason = predicted["step_ms"]["reason"]
        assert reason.endswith("run sglang perf rates --dtype float32 --ranks 2")


@pytest.fixture(scope="module")
def mid_size(tmp_path_factory):
    """A folder for models, beside rates that were measured on this machine."""
    folder = tmp_path_factory.mktemp("predictions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_GEN_CACHE", str(folder / "cache"))
        predictions.measure_rates("bfloat16", [1, 2])
    return folder


@pytest.mark.slow  # networks of hundreds of MB, in processes of their own
@pytest.mark.parametrize(
    ("case", "layout"),
    [("landscape", "single"), ("landscape", "sp2"), ("landscape", "tp2"), ("flux", "single"), ("flux", "tp2"),
     ("sdxl", "single")],
)  # fmt: skip
def test_memory_is_predicted_within_a_tenth_and_work_and_communication_exactly(mid_size, monkeypatch, case, layout):
    model = predictions.model_of(case, mid_size)
    words = [*predictions.WORDS[case], *model, "--dtype", "bfloat16", f"parallel={layout}", "attention=sdpa"]
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(mid_size / "cache"))
    found = predictions.run(words, mid_size / "perf.json")
    assert len(found["ranks"]) == predictions.LAYOUTS[layout]
    for rank in found["ranks"]:
        assert 0.9 < rank["predicted"]["memory_mb"]["ratio"] < 1.1
        assert rank["predicted"]["flops"]["ratio"] == 1
        assert rank["predicted"]["communication_bytes"]["ratio"] == (None if layout == "single" else 1)
        assert rank["predicted"]["total_ms"]["ratio"] > 0.2  # other programs make it larger without a limit


def test_a_component_that_cannot_be_traced_is_a_reason_and_no_failure(dump, pipelines, monkeypatch):
    def failing(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(dry_predictions, "trace_text_encoder", failing)
    found = dump(pipelines["sd15"], "--backend", "sglang")["predicted"]
    assert found["memory_mb"]["reason"] == "a component of this model cannot be traced on the meta device"
    assert found["flops"]["measured"] > 0


def test_the_blocks_that_a_step_cache_chose_are_predicted_and_its_memory_is_not(dump, pipelines):
    words = ("cache=dbcache", "cache.Fn_compute_blocks=1", "cache.max_warmup_steps=1",
             "cache.residual_diff_threshold=1.0")  # fmt: skip
    found = dump(pipelines["sd3"], "--backend", "sglang", *words)["predicted"]
    assert found["memory_mb"]["reason"] == "the memory of a step cache is not predicted"
    assert found["flops"]["ratio"] == 1
    full = dump(pipelines["sd3"], "--backend", "sglang")["predicted"]
    assert found["flops"]["measured"] < full["flops"]["measured"]


@pytest.mark.parametrize(("name", "backend", "scheduler"), [
    ("sd15", "sglang", True), ("sd3", "sglang", False), ("sd3", "diffusers", True),
])  # fmt: skip
def test_classes_of_other_libraries_are_imported_before_the_memory_that_a_run_adds_to(
    pipelines, monkeypatch, name, backend, scheduler
):
    plan = planned(pipelines[name], "float32", backend)
    module = importlib.import_module(BACKENDS[backend])
    seen = []
    monkeypatch.setattr(component_classes, "named", lambda component: seen.append(component.class_name))
    module.import_classes(plan)
    parts = plan.card.components
    expected = [key for key in parts if key.startswith("text_encoder") or (key == "scheduler" and scheduler)]
    assert {parts[key].class_name for key in expected} <= set(seen)
    assert (parts["scheduler"].class_name in seen) == scheduler


def test_freed_memory_returns_before_each_level_with_a_large_input_and_is_traced_there(monkeypatch, pipelines):
    card = resolve.read_card(pipelines["sd15"], "sd15", weights=False)
    family, request = rehearsed.FAMILIES["sd"], Request(Size(64, 64), rehearsed.FACTOR, 1, 1.0, None)
    config = autoencoder.config(card.components["vae"].config)
    latents = torch.randn(family.autoencoder_shape(config, request, 2))
    network = vae_parallel.split(Autoencoder(config), Axis("sp", 1, 0))
    order: list[object] = []
    monkeypatch.setattr(freed_memory, "return_freed_memory", lambda: order.append("returned"))
    for level in network.decoder.up:
        level.register_forward_pre_hook(lambda _, args: order.append(args[0].nbytes))
    network.decode(latents)
    sizes = order.copy()
    assert len(sizes) == len(config.widths)
    assert max(sizes) < freed_memory.LARGE  # a small model returns nothing
    large = sorted(sizes)[1]
    monkeypatch.setattr(freed_memory, "LARGE", large)
    order.clear()
    network.decode(latents)
    assert order == [part for size in sizes for part in (["returned", size] if size >= large else [size])]
    assert 0 < order.count("returned") < len(sizes)
    traced = trace_decoding(family, Axis("sp", 1, 0), card, request, 2, torch.float32, "cpu")
    assert traced.events.count(RETURNED) == order.count("returned")
    order.clear()
    network.to("meta").decode(latents.to("meta"))
    assert "returned" not in order  # only a CPU's memory comes from the heap
