"""The perf dump: its fields, its sums, the counted work, and what its fingerprint tells apart."""

import datetime
import importlib.metadata
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from sglang_gen import generate
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.flag_values import python_flags
from sglang_gen.config.schema import Machine
from sglang_gen.hub import resolve
from sglang_gen.perf import dump as dumping
from sglang_gen.perf import flops, machine
from sglang_gen.plan.make import make_plan

SIZE = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "--seed", "7")
STAGES = ["load", "text_encoding", "latents", "denoising", "decoding", "saving"]
QUIET = ("perf.machine_rates=false", "perf.work=false")


@pytest.fixture
def dump(sglang):
    """Run with --perf-dump-path and read what was written."""

    def run(model: Path, *words: str, dtype: str = "float32") -> dict:
        always = ("--prompt", "a", *SIZE, "--dtype", dtype, "--perf-dump-path", "p.json")
        done = sglang("generate", "--model-path", model, *always, *words)
        assert done.code == 0, done.err
        assert done.lines[-1] == "INFO: Performance metrics saved to: p.json"
        return json.loads(Path("p.json").read_text())

    return run


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[tuple[str, str]]:
    """Rates are measured in no time, into an empty cache; the list tells how often."""
    calls: list[tuple[str, str]] = []

    def measure(device: str, dtype: str) -> dict[str, float]:
        calls.append((device, dtype))
        return {"matmul_tflops": 0.5, "memory_gb_per_s": 10.0}

    monkeypatch.setattr(machine, "_measure", measure)
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "rates"))
    return calls


def test_the_fields_are_upstreams_and_ours(dump, pipelines, measured):
    found = dump(pipelines["sdxl"], "perf.tag=night")
    upstream = {"timestamp", "request_id", "commit_hash", "tag", "total_duration_ms", "steps", "denoise_steps_ms",
                "memory_checkpoints", "meta"}  # fmt: skip
    ours = {"schema_version", "samples", "images_per_second", "warmup", "load", "requested", "effective", "fingerprint",
            "machine", "work", "comm", "cache", "quality", "energy_j", "trace"}  # fmt: skip
    assert upstream | ours <= set(found)
    assert datetime.datetime.fromisoformat(found["timestamp"]).tzinfo is not None
    assert (found["tag"], found["warmup"], found["comm"]) == ("night", None, {})
    assert found["meta"] == {"prompt": "a", "model": str(pipelines["sdxl"])}
    assert [set(step) for step in found["steps"]] == [{"name", "duration_ms"}] * len(STAGES)
    assert {"step", "duration_ms"} <= set(found["denoise_steps_ms"][0])
    assert found["machine"]["rates"] == {"matmul_tflops": 0.5, "memory_gb_per_s": 10.0, "source": "measured"}
    assert found["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(found["work"]) == {"text_encoding", "denoising", "decoding"}
    for work in found["work"].values():
        assert work["flops"] > 0
        assert work["bytes"] > 0
        assert 0 <= work["mfu"] < 1
        assert work["bound"] in ("compute", "memory", "launch")


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_each_stage_has_one_entry_and_the_sums_agree(dump, pipelines, name):
    found = dump(pipelines[name], "--num-samples", "3", "sampling.batch_size=2", *QUIET)
    assert [step["name"] for step in found["steps"]] == STAGES
    durations = {step["name"]: step["duration_ms"] for step in found["steps"]}
    assert all(duration >= 0 for duration in durations.values())
    assert found["load"]["duration_ms"] == durations.pop("load")
    assert found["total_duration_ms"] == pytest.approx(sum(durations.values()), abs=0.01)
    steps = [(entry["batch"], entry["step"]) for entry in found["denoise_steps_ms"]]
    assert steps == [(0, 0), (0, 1), (1, 0), (1, 1)]
    denoising = sum(entry["duration_ms"] for entry in found["denoise_steps_ms"])
    assert 0 < denoising <= durations["denoising"] + 0.01
    assert found["cpu_duration_ms"] > 0
    assert found["images_per_second"] == pytest.approx(3000 / found["total_duration_ms"], rel=1e-3)
    assert [(sample["seed"], sample["batch"], sample["file"]) for sample in found["samples"]] == [
        (7 + index, index // 2, f"generated_image_{index}.png") for index in range(3)
    ]
    assert set(found["memory_checkpoints"]) == set(STAGES)
    for checkpoint in found["memory_checkpoints"].values():
        assert set(checkpoint) == {"allocated_mb", "reserved_mb", "peak_allocated_mb", "peak_reserved_mb",
                                   "peak_host_anon_mb"}  # fmt: skip
        assert checkpoint["peak_host_anon_mb"] > 10
        assert checkpoint["allocated_mb"] is None  # no GPU


def test_warmup_is_told_apart(dump, pipelines):
    found = dump(pipelines["sd15"], "--warmup", "--warmup-steps", "3", *QUIET)
    assert found["warmup"]["steps"] == 3
    assert found["warmup"]["duration_ms"] > 0
    assert len(found["denoise_steps_ms"]) == 2


class Small(ModelMixin, ConfigMixin):
    """A linear layer, then attention of every token to every token."""

    @register_to_config
    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_the_work_of_a_linear_layer_and_attention_is_the_formula():
    model, log, x = Small(), flops.CallLog(on=True), torch.zeros(2, 7, 24)
    log.watch(flops.Watched("denoising", "small", model))
    for _ in range(3):
        model(x)
    model(torch.zeros(1, 5, 24))
    linear = [2 * batch * length * 24 * 24 for batch, length in ((2, 7), (1, 5))]
    attention = [2 * 2 * batch * length * length * 24 for batch, length in ((2, 7), (1, 5))]
    found = flops.work(log, {"denoising": 1000.0}, {"matmul_tflops": 1e-6, "memory_gb_per_s": 1e-6}, {})["denoising"]
    total = 3 * (linear[0] + attention[0]) + linear[1] + attention[1]
    weights = 4 * (24 * 24 + 24)
    assert found["flops"] == total
    assert found["bytes"] == 3 * (weights + 4 * 2 * 7 * 24) + weights + 4 * 5 * 24
    assert found["mfu"] == pytest.approx(total / 1e6, abs=1e-4)
    assert sorted(call.count for call in log.calls.values()) == [1, 3]


def test_only_the_weights_that_a_call_uses_are_read():
    class Half(Small):
        def __init__(self, config: object = None) -> None:
            super().__init__()
            self.idle = nn.Linear(1000, 1000)

    model, log = Half(), flops.CallLog(on=True)
    log.watch(flops.Watched("denoising", "half", model))
    model(torch.zeros(1, 5, 24))
    found = flops.work(log, {"denoising": 1.0}, {}, {})["denoising"]
    assert found["bytes"] == pytest.approx(4 * (24 * 24 + 24) + 4 * 5 * 24, abs=8)


def test_rates_that_do_not_fit_into_memory_are_told_and_not_kept(monkeypatch, tmp_path):
    def full(device: str, dtype: str) -> dict[str, float]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "rates"))
    monkeypatch.setattr(machine, "_measure", full)
    assert machine.rates("cpu", "float32", Machine()) == {"source": "not measured: memory ran out"}
    assert not (tmp_path / "rates").exists()


def test_a_network_that_cannot_be_counted_says_why(monkeypatch):
    class Fickle(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() else x + 1

    lines: list[str] = []
    monkeypatch.setattr(flops.log, "debug", lines.append)
    model, log = Fickle(), flops.CallLog(on=True)
    log.watch(flops.Watched("denoising", "fickle", model))
    model(torch.zeros(1, 5, 24))
    found = flops.work(log, {"denoising": 1.0}, {}, {})
    assert set(found["denoising"]) == {"reason"}
    assert found["denoising"]["reason"] == "Fickle cannot be counted on meta"
    (line,) = lines
    assert line.startswith("Fickle.forward cannot be counted on meta:\n")
    assert "\nRuntimeError: " in line


@pytest.mark.whole
@pytest.mark.parametrize(("name", "network"), [("sd3", "SD3Transformer2DModel"), ("sdxl", "UNet2DConditionModel")])
def test_the_work_of_denoising_is_what_its_layers_did(dump, pipelines, monkeypatch, measured, name, network):
    """Counted a second way: every linear layer, convolution and attention that really ran inside of the network."""
    inside, done = [], []
    cls = getattr(diffusers, network)

    def patch(owner, attribute, cost):
        original = getattr(owner, attribute)

        def counted(*args, **kwargs):
            result = original(*args, **kwargs)
            if inside and result.device.type != "meta":
                done.append(cost(result, *args))
            return result

        monkeypatch.setattr(owner, attribute, counted)

    patch(nn.Linear, "forward", lambda out, layer, x: 2 * out.numel() * layer.in_features)
    patch(nn.Conv2d, "forward", lambda out, layer, x, *_: 2 * out.numel() * layer.weight[0].numel())
    patch(nn.functional, "scaled_dot_product_attention", lambda out, q, k, v: 4 * q.numel() * k.shape[-2])
    forward = cls.forward

    def watched(self, *args, **kwargs):
        inside.append(True)
        try:
            return forward(self, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(cls, "forward", watched)
    found = dump(pipelines[name], "--backend", "diffusers")
    assert found["work"]["denoising"]["flops"] == sum(done) > 1e6


SETTINGS = {"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 1, "dtype": "float32", "seed": 1}


def test_what_conditioning_sends_is_sent_while_denoising():
    def sent(**collectives: int) -> dict:
        return {"collectives": {name: {"calls": 1, "bytes": size} for name, size in collectives.items()}}

    comm = {"text_encoding": sent(tp=1), "conditioning": sent(tp=20), "denoising": sent(tp=300, sp=4000)}
    assert dumping._sent(comm) == {"text_encoding": 1, "denoising": 4320}


def test_equal_work_has_equal_fingerprints(pipelines, tmp_path):
    def fingerprint(model: Path, *overrides: str, **flags: object) -> dict:
        result = generate(*overrides, model_path=str(model), **(SETTINGS | flags))
        assert result is not None
        return result.report["fingerprint"]

    moved = shutil.copytree(pipelines["sd15"], tmp_path / "elsewhere")
    first = fingerprint(pipelines["sd15"])
    second = fingerprint(moved, "perf.tag=other", *QUIET, prompt="a long walk", seed=9, output_path="other",
                         log_level="warning", negative_prompt="b", perf_dump_path="x.json")  # fmt: skip
    assert first["fields"] == second["fields"]
    assert first["hash"] == second["hash"]
    assert first["fields"]["size"] == [32, 32]
    assert str(tmp_path) not in json.dumps(second)


@pytest.mark.whole
def test_other_work_has_another_fingerprint(pipelines, tmp_path):
    """Of plans, so that nothing needs to run; what an engine adds is taken from the model's card."""

    def fingerprint(model: Path, *overrides: str, **flags: object) -> str:
        words = python_flags({"model_path": str(model)} | SETTINGS | flags)
        composed = compose(Choices(overrides=overrides, flags=words))
        plan = make_plan(composed, resolve.find(composed.run.model, weights=False))
        sampling, parts = composed.run.sampling, plan.card.components
        built = {
            "height": sampling.height,
            "width": sampling.width,
            "components": {n: parts[n].class_name for n in parts},
        }
        return dumping.fingerprint(plan, {**plan.effective, **built})["hash"]

    model = pipelines["sd15"]
    ddim, shifted = (shutil.copytree(model, tmp_path / name) for name in ("ddim", "shifted"))
    index = json.loads((ddim / "model_index.json").read_text())
    (ddim / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    settings = json.loads((shifted / "scheduler" / "scheduler_config.json").read_text())
    (shifted / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings | {"steps_offset": 0}))
    hashes = {
        "base": fingerprint(model),
        "steps": fingerprint(model, num_inference_steps=2),
        "height": fingerprint(model, height=64),
        "dtype": fingerprint(model, dtype="bfloat16"),
        "samples": fingerprint(model, num_samples=2),
        "batch": fingerprint(model, "sampling.batch_size=2", num_samples=2),
        "warmup": fingerprint(model, warmup=True),
        "warmup steps": fingerprint(model, warmup=True, warmup_steps=2),
        "guidance": fingerprint(model, guidance_scale=1.0),
        "scheduler": fingerprint(ddim),
        "scheduler settings": fingerprint(shifted),
        "arguments": fingerprint(model, diffusers_kwargs='{"true_cfg_scale": 4}'),
        "a second branch": fingerprint(model, diffusers_kwargs='{"true_cfg_scale": 4}', negative_prompt="b"),
        "deterministic": fingerprint(model, "deterministic=true"),
        "latents": fingerprint(model, "output.latents=true"),
        "text length": fingerprint(model, "sampling.max_sequence_length=16"),
        "autocast": fingerprint(model, disable_autocast=True),
        "library of products": fingerprint(model, "backend.float32_matmul=onednn"),
        "network": fingerprint(pipelines["sdxl"]),
    }
    assert len(set(hashes.values())) == len(hashes), hashes


@pytest.mark.whole
def test_repeats_do_not_add_to_the_work_of_one_generation(dump, pipelines, measured):
    once, thrice = dump(pipelines["sd3"]), dump(pipelines["sd3"], "perf.repeat=3")
    assert len(thrice["repeats"]) == 3
    for repeat in thrice["repeats"]:  # only the first saves, which counts for none
        stages = {step["name"]: step["duration_ms"] for step in repeat["steps"]}
        assert repeat["total_duration_ms"] == pytest.approx(sum(stages.values()) - stages.get("saving", 0), abs=0.01)
    assert thrice["total_duration_ms"] > thrice["repeats"][0]["total_duration_ms"]
    for stage, work in once["work"].items():
        assert (thrice["work"][stage]["flops"], thrice["work"][stage]["bytes"]) == (work["flops"], work["bytes"])


@pytest.mark.whole
def test_rates_are_measured_once_and_kept(dump, pipelines, measured):
    first = dump(pipelines["sd15"], "perf.work=false")
    second = dump(pipelines["sd15"], "perf.work=false")
    assert measured == [("cpu", "float32")]
    assert first["machine"]["rates"] == second["machine"]["rates"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"matmul_tflops": "fast", "memory_gb_per_s": 1.0}'])
def test_a_corrupt_file_of_rates_is_measured_again(measured, tmp_path, content):
    machine.rates("cpu", "float32", Machine())
    (file,) = (tmp_path / "rates" / "machine").iterdir()
    file.write_text(content)
    assert machine.rates("cpu", "float32", Machine())["matmul_tflops"] == 0.5
    assert len(measured) == 2
    assert json.loads(file.read_text())["matmul_tflops"] == 0.5


def test_a_cache_that_cannot_be_written_is_harmless(dump, pipelines, measured, monkeypatch):
    Path("taken").write_text("a file")
    monkeypatch.setenv("SGLANG_GEN_CACHE", "taken")
    assert dump(pipelines["sd15"], "perf.work=false")["machine"]["rates"]["source"] == "measured"
    assert machine.rates("cpu", "float32", Machine())["source"] == "measured"
    assert len(measured) == 2


def test_the_measured_rates_are_plausible():
    found = machine.rates("cpu", "float32", Machine())
    assert 1e-3 < found["matmul_tflops"] < 100
    assert 0.1 < found["memory_gb_per_s"] < 10_000


@pytest.mark.whole
def test_a_named_machine_gives_its_own_rates_which_are_those_of_half_precision(dump, pipelines, measured):
    found = dump(pipelines["sd15"], "machine=h200")
    assert measured == []
    assert found["machine"]["rates"]["source"] == "machine=h200"
    assert found["machine"]["rates"]["memory_gb_per_s"] > 4000
    assert (found["machine"]["rates"]["matmul_tflops"], found["work"]["denoising"]["mfu"]) == (None, None)
    half = dump(pipelines["sd15"], "machine=h200", dtype="bfloat16")
    assert half["machine"]["rates"]["matmul_tflops"] > 500
    assert half["work"]["denoising"]["mfu"] < 0.01


@pytest.mark.whole
def test_counting_and_measuring_can_be_switched_off(dump, pipelines, measured):
    unmeasured = dump(pipelines["sd15"], "perf.machine_rates=false")
    assert "rates" not in unmeasured["machine"]
    assert (unmeasured["work"]["denoising"]["mfu"], unmeasured["work"]["denoising"]["bound"]) == (None, None)
    assert unmeasured["work"]["denoising"]["flops"] > 0
    uncounted = dump(pipelines["sd15"], "perf.work=false")
    assert uncounted["work"] is None
    assert uncounted["machine"]["rates"]["source"] == "measured"
    assert measured == [("cpu", "float32")]
