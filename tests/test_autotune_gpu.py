"""How attention=auto times kernels on a GPU, and what a ring may run there; stand-ins take the GPU's place."""

import json
import types
from collections import Counter

import pytest
import torch
from native import record
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen import env
from sglang_gen.engine import attention_autotune, attention_kernels
from sglang_gen.engine.meta_trace import trace_on_meta
from sglang_gen.families import registry
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.perf.clock import Timer
from sglang_gen.types import Layout

HALF = torch.bfloat16
LAUNCH_US = 58.0  # of the host, for each call


class Gpu:
    """A queue of kernels in front of a device, in microseconds; `calls` names the kernels in their order."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.calls: list[str] = []
        self.noise = iter(())

    def timer(self, _: str) -> Timer:
        return Timer(self.wait, lambda: self.device, lambda begun, ended: (ended - begun) / 1000)

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def hold(self, _: str, milliseconds: float) -> None:
        self.device = max(self.device, self.host) + 1000 * milliseconds

    def now(self) -> float:
        return self.host / 1e6

    def kernel(self, name: str, us: float):
        def attend(*_):
            self.calls.append(name)
            self.host += LAUNCH_US
            self.device = max(self.device, self.host) + us + next(self.noise, 0.0)

        return attend


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(attention_autotune, "timer", gpu.timer)
    monkeypatch.setattr(attention_autotune, "_hold", gpu.hold)
    monkeypatch.setattr(attention_autotune, "time", types.SimpleNamespace(perf_counter=gpu.now))
    return gpu


SHAPES = Counter({(1, 2, 8, 8, 16): 10})


def test_kernels_that_are_shorter_than_their_launch_are_told_apart(gpu):
    kernels = {"sdpa": gpu.kernel("sdpa", 30), "cudnn": gpu.kernel("cudnn", 5), "flash": gpu.kernel("flash", 4000)}
    seconds = attention_autotune.measure(kernels, SHAPES, "cpu", HALF)
    assert seconds == pytest.approx({"sdpa": 300e-6, "cudnn": 50e-6, "flash": 40e-3})


def test_a_batch_lasts_two_milliseconds_and_batches_of_the_kernels_take_turns(gpu):
    kernels = {"sdpa": gpu.kernel("sdpa", 30), "cudnn": gpu.kernel("cudnn", 10)}
    attention_autotune.measure(kernels, SHAPES, "cpu", HALF)
    runs: list[list] = []
    for name in gpu.calls:
        if not runs or runs[-1][0] != name:
            runs.append([name, 0])
        runs[-1][1] += 1
    batches = runs[2:]  # each is warmed up and sized first
    assert [name for name, _ in batches] == ["sdpa", "cudnn"] * attention_autotune.ROUNDS
    for name, calls in batches:
        assert calls * {"sdpa": 30, "cudnn": 10}[name] >= 2000


def test_a_batch_that_was_interrupted_does_not_decide(gpu):
    kernels = {"sdpa": gpu.kernel("sdpa", 3000), "cudnn": gpu.kernel("cudnn", 2500)}
    quiet, late = [0.0] * 4, [0.0, 90_000.0] * 2  # two of the five batches of cudnn
    gpu.noise = iter([*quiet, *late])
    assert attention_autotune.measure(kernels, SHAPES, "cpu", HALF)["cudnn"] == pytest.approx(25e-3)


def test_a_gpu_is_held_by_its_own_clock(monkeypatch):
    cycles = []
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append, raising=False)
    for device, milliseconds in (("cpu", 2.0), ("cuda", 0.0), ("cuda", 2.0), ("cuda", 10_000.0)):
        attention_autotune._hold(device, milliseconds)
    assert cycles == [4_000_000, 200_000_000]


@pytest.fixture
def hardware(monkeypatch, tmp_path):
    """A named GPU of a capability, with versions of libraries, each of which a test changes."""
    monkeypatch.setenv("SGLANG_GEN_CACHE", str(tmp_path / "cache"))
    found = {"name": "NVIDIA H200", "capability": (9, 0), "cudnn": 91900, "torch": "2.13.0", "flash_attn": "2.8.3"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: found["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found["capability"])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: found["cudnn"])
    monkeypatch.setattr(env, "package_version", lambda name: found.get(name))
    monkeypatch.setattr(torch, "__version__", found["torch"])
    return found


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("name", "NVIDIA H100"), ("capability", (10, 0)), ("cudnn", 91000), ("flash_attn", None),
        ("flash_attn_3", "3.0.0"), ("sageattention", "2.2.0"), ("torch", "2.12.0"),
    ],
)  # fmt: skip
def test_another_gpu_or_library_is_timed_again(hardware, monkeypatch, fact, value):
    asked = []
    monkeypatch.setattr(attention_autotune, "measure", lambda *_: asked.append(1) or {"sdpa": 1.0, "cudnn": 0.5})
    kernels = {"sdpa": lambda *_: None, "cudnn": lambda *_: None}
    for _ in range(2):
        assert attention_autotune.fastest(kernels, SHAPES, "cuda", HALF) == "cudnn"
    assert len(asked) == 1
    hardware[fact] = value
    monkeypatch.setattr(torch, "__version__", hardware["torch"])
    attention_autotune.fastest(kernels, SHAPES, "cuda", HALF)
    assert len(asked) == 2


def test_an_answer_under_other_facts_is_not_read(hardware, monkeypatch):
    """A file of an older version that has the name of a new one."""
    kernels = {"sdpa": lambda *_: None, "cudnn": lambda *_: None}
    monkeypatch.setattr(attention_autotune, "measure", lambda *_: {"sdpa": 1.0, "cudnn": 0.5})
    attention_autotune.fastest(kernels, SHAPES, "cuda", HALF)
    (file,) = (env.cache_dir() / "attention").iterdir()
    content = json.loads(file.read_text())
    for old in ({"kernel": "sdpa", "seconds": {}}, {**content, "kernel": "sdpa", "facts": content["facts"][1:]}):
        file.write_text(json.dumps(old))
        assert attention_autotune.fastest(kernels, SHAPES, "cuda", HALF) == "cudnn"


@pytest.mark.parametrize(
    ("layout", "calls"),
    [
        (Layout(ulysses=2), {(1, 1, 21, 21, 16)}),
        (Layout(ring=2), {(1, 2, 11, 11, 16, "lse"), (1, 2, 11, 10, 16, "lse")}),
        (Layout(ring=2, ulysses=2), {(1, 1, 11, 11, 16, "lse"), (1, 1, 11, 10, 16, "lse")}),
    ],
)
def test_the_shapes_are_those_that_a_rank_of_the_layout_computes(layout, calls):
    """4 x 4 tokens of the image and 5 of a text: a ring's ranks have 11 and 10 of them."""
    spec = next(spec for spec in registry.specs() if spec.name == "flux")
    family = registry.pipeline(spec)
    split = Split(Mesh(layout, 0), family.tensor_parallel, family.sharding)
    with torch.device("meta"):
        network = family.build(registry.examples(spec).tiny)
        config = network.config
        latents = torch.empty(1, 16, config.channels_in)
        texts = torch.empty(1, 5, config.text_width), torch.empty(1, config.pooled_width)

    def evaluate(entrance) -> None:
        entrance(latents, entrance.condition(torch.zeros(2, device="cpu"), *texts, 3.5, 4, 4), 0)

    shapes = trace_on_meta(split.parallelize(network), (), evaluate).attention
    assert set(shapes) == calls


@pytest.mark.whole
def test_a_ring_is_timed_with_the_kernels_that_it_runs(gpu, monkeypatch):
    """The same kernel takes longer where it returns the log-sum-exp too."""
    kernels = {"sdpa": gpu.kernel("sdpa", 30), "cudnn": gpu.kernel("cudnn", 5)}
    with_lse = {"sdpa": gpu.kernel("sdpa with lse", 30), "cudnn": gpu.kernel("cudnn with lse", 90)}
    shapes = Counter({(1, 2, 8, 8, 16, "lse"): 1, (1, 2, 8, 4, 16): 1})
    seconds = attention_autotune.measure(kernels, shapes, "cpu", HALF, with_lse)
    assert seconds == pytest.approx({"sdpa": 60e-6, "cudnn": 95e-6})


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's operator, from plain products; its version."""

    def attend(q, k, v, bias, compute_log_sumexp):
        assert bias is None
        assert compute_log_sumexp is True
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True), None, None, 0, 0, None, None, None

    operators = types.SimpleNamespace(aten=types.SimpleNamespace(_scaled_dot_product_cudnn_attention=attend))
    monkeypatch.setattr(attention_kernels.torch, "ops", operators)
    return lambda version: monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)


def test_a_ring_merges_what_cudnn_computes(cudnn):
    cudnn(91900)
    q, k, v = (torch.randn(2, 3, length, 16) for length in (24, 18, 18))
    out, lse = attention_kernels.kernel_with_lse("cudnn", "cuda", HALF)(q, k, v)
    assert torch.allclose(out, scaled_dot_product_attention(q, k, v), atol=1e-6)
    assert torch.allclose(lse, (q @ k.mT * 16**-0.5).logsumexp(-1), atol=1e-6)


def test_torchs_operator_of_cudnn_has_the_schema_that_a_ring_expects():
    q = torch.empty(2, 3, 24, 16, device="meta", dtype=torch.bfloat16)
    out, lse = attention_kernels._cudnn_with_lse(q, q[:, :, :18], q[:, :, :18])
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)


@pytest.mark.parametrize(
    ("version", "lengths", "offered"),
    [(91900, (100, 90), True), (91500, (100, 90), True), (91400, (100, 90), False), (91400, (256, 128), True),
     (91400, (256, 100), False), (None, (100, 90), False)],
)  # fmt: skip
def test_an_old_cudnn_is_left_out_at_lengths_that_128_does_not_divide(cudnn, version, lengths, offered):
    cudnn(version)
    shapes = [(1, 2, lengths[0], lengths[1], 16, "lse"), (1, 2, 100, 77, 16)]
    aligned = attention_kernels.aligned(shapes)
    found = attention_kernels.kernel_with_lse("cudnn", "cuda", HALF, aligned=aligned)
    assert found is (attention_kernels._cudnn_with_lse if offered else None)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, False), (HALF, True)])
def test_cudnn_merges_in_half_precision_without_masks_alone(cudnn, dtype, masked):
    cudnn(91900)
    assert attention_kernels.kernel_with_lse("cudnn", "cuda", dtype, masked) is None


@pytest.mark.slow
def test_the_run_of_a_ring_offers_only_kernels_that_merge(run_on_ranks):
    done = run_on_ranks("sd3", "parallel=ring2", "attention=auto", dtype="bfloat16", steps=1)
    assert done.code == 0, done.err
    assert record("outputs")["effective"]["attention"] in ("sdpa", "math")
    assert record("outputs")["effective"]["ring"] == "merged"
