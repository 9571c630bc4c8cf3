"""What a run does for a GPU and no test of a CPU reaches by itself; a stand-in takes the GPU's place."""

import gc
import json
import os
import re
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from two_steps import two_steps
from whole import plan_of

from sglang_gen import env, generate
from sglang_gen.backends import memory_error
from sglang_gen.backends.diffusers import engine as diffusers_engine
from sglang_gen.backends.native import engine as native
from sglang_gen.config.schema import Run
from sglang_gen.debug import parity
from sglang_gen.engine import attention_kernels
from sglang_gen.errors import RunError, UserError
from sglang_gen.launch import rank
from sglang_gen.parallel import mesh
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.perf import clock
from sglang_gen.plan import layout_limits


@pytest.fixture
def run(pipelines, sglang):
    return two_steps(pipelines, sglang)


@pytest.fixture
def ends(monkeypatch):
    """A run whose work is `work`, on a GPU that is not there; how often its memory was given back."""
    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("memory"))
    monkeypatch.setattr(rank, "Memory", lambda _: nullcontext())

    def go(work, device: str, dtype: str, deterministic: bool = False) -> int:
        monkeypatch.setattr(rank, "_run", work)
        asked = SimpleNamespace(run=Run(deterministic=deterministic), device=device, dtype=dtype)
        rank.run(asked, Mesh(), 0.0)
        return len(given_back)

    return go


@pytest.mark.whole
@pytest.mark.parametrize(("dtype", "rounded"), [("float32", False), ("bfloat16", True)])
def test_convolutions_in_float32_keep_all_their_bits(ends, dtype, rounded):
    seen = []
    assert torch.backends.cudnn.allow_tf32 is True
    ends(lambda *_: seen.append(torch.backends.cudnn.allow_tf32), "cuda", dtype)
    assert seen == [rounded]
    assert torch.backends.cudnn.allow_tf32 is True


@pytest.mark.whole
def test_a_run_gives_its_memory_back_also_where_it_fails(ends):
    assert ends(lambda *_: None, "cpu", "float32") == 0
    assert ends(lambda *_: None, "cuda", "float32") == 1

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        ends(fail, "cuda", "float32")
    assert ends(lambda *_: None, "cuda", "float32") == 3
    assert torch.backends.cudnn.allow_tf32 is True


class Held:
    """An engine that holds itself, as one does whose methods are watched."""

    def __init__(self) -> None:
        self.itself = self

    def sample(self) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            raise RunError("Out of memory while generating") from error


@pytest.mark.whole
def test_the_model_of_a_run_that_failed_is_gone_when_the_next_one_begins(ends, monkeypatch):
    """Though its error is kept, as Python keeps one that is being handled."""
    engines, alive = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.extend(engine() is not None for engine in engines))

    def fail(*_):
        engine = Held()
        engines.append(weakref.ref(engine))
        engine.sample()

    with pytest.raises(RunError) as kept:
        ends(fail, "cuda", "float32")
    assert alive == [False]
    assert isinstance(kept.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.whole
def test_a_real_engine_is_let_go_of_by_the_error_that_ends_it(pipelines, monkeypatch):
    engines = []

    def fail(engine, *_):
        engines.append(weakref.ref(engine))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(native.NativeEngine, "_decode", fail)
    with pytest.raises(RunError, match="Out of memory while generating") as kept:
        generate(model_path=str(pipelines["sd3"]), prompt="a", height=32, width=32, num_inference_steps=1)
    gc.collect()
    assert [engine() for engine in engines] == [None]
    assert kept.value.__traceback__ is not None


@pytest.mark.whole
@pytest.mark.parametrize("deterministic", [False, True])
def test_torch_is_deterministic_inside_of_a_run_that_asks_for_it(ends, deterministic):
    seen = []
    ends(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()), "cuda", "float32", deterministic)
    assert seen == [deterministic]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("dtype", "rounded"), [("float32", False), ("bfloat16", True)])
def test_a_comparison_of_the_backends_rounds_as_a_run_does(monkeypatch, dtype, rounded):
    seen = []

    def load(*_):
        seen.append(torch.backends.cudnn.allow_tf32)
        raise RunError("enough")

    monkeypatch.setattr(native, "load", load)
    choices, card = SimpleNamespace(deterministic=False), SimpleNamespace(name="a model")
    asked = SimpleNamespace(run=choices, device="cpu", dtype=dtype, card=card)
    with pytest.raises(RunError, match="enough"):
        parity.run(asked, asked, None)
    assert seen == [rounded]
    assert torch.backends.cudnn.allow_tf32 is True


def test_every_group_of_ranks_is_connected_before_anything_is_timed(monkeypatch):
    """NCCL connects a group at its first collective, and each pair of ranks at their first exchange."""
    used = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(*size))
    monkeypatch.setattr(mesh.dist, "get_world_size", lambda group: 4 if group is None else 2)
    monkeypatch.setattr(mesh.dist, "all_reduce", lambda tensor, group: used.append(("sum", group)))
    monkeypatch.setattr(mesh.dist, "all_to_all_single", lambda out, given, group: used.append((len(given), group)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: used.append("waited"))
    mesh._connect({"tp": "first", "sp": "second"})
    assert used == [
        ("sum", None),
        (4, None),
        ("sum", "first"),
        (2, "first"),
        ("sum", "second"),
        (2, "second"),
        "waited",
    ]


class Queue:
    """Stands in for the GPU: work of 5 ms lies before each event, whose time is known once the host waited for it.

    `order` has what the host did: "record", and "wait" for the device.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        self.now = self.finished = 0.0

    def wait(self) -> None:
        self.order.append("wait")
        self.finished = self.now

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, 0.0

    def record(self) -> None:
        self.queue.order.append("record")
        self.queue.now += 5.0
        self.at = self.queue.now

    def elapsed_time(self, end: "Event") -> float:
        assert self.at <= end.at <= self.queue.finished
        return end.at - self.at


@pytest.fixture
def queue(monkeypatch) -> Queue:
    """The device of all clocks of a run, which computes on the CPU."""
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.wait)
    monkeypatch.setattr(rank, "timer", lambda _: clock.timer("cuda"))
    return queue


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_steps_are_timed_by_events_that_are_read_after_the_loop(run, queue, backend):
    done = run("sd3", "--backend", backend, "--num-samples", "2", "sampling.batch_size=1",
               "--perf-dump-path", "perf.json", steps=3)  # fmt: skip
    assert done.code == 0, done.err
    steps = json.loads(Path("perf.json").read_text())["denoise_steps_ms"]
    assert steps == [{"step": step, "duration_ms": 5.0, "batch": batch} for batch in (0, 1) for step in range(3)]
    loops = [stretch for stretch in " ".join(queue.order).split("wait") if stretch.split() != ["record"]]
    assert [stretch.split() for stretch in loops if stretch.strip()] == [["record"] * 4] * 2


def test_no_test_sees_a_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0


def test_a_kernel_that_warns_why_it_refuses_is_one_that_does_not_run(monkeypatch):
    def refuse(*_):
        warnings.warn("Flash attention kernel not used because: the head is too large", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention_kernels, "inside_sdpa", lambda _: refuse)
    assert attention_kernels.runs("flash", "cpu", torch.float32) is False


@pytest.fixture
def gpus(monkeypatch):
    """A process of a launcher, with so many others on its machine, that sees so many GPUs; the one it computes on."""
    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)

    def see(count: int, here: int) -> list[int]:
        place = env.Torchrun(rank=0, ranks=here, local=0, here=here, node=0)
        monkeypatch.setattr(env, "torchrun", lambda: place if here else None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        return used

    return see


def test_a_process_that_is_given_a_gpu_of_its_own_computes_on_that(gpus):
    """As SLURM gives each process its CUDA_VISIBLE_DEVICES."""
    used = gpus(1, here=4)
    layout_limits.check_machine(4, "cuda")
    mesh.use_gpu(3)
    gpus(4, here=4)
    layout_limits.check_machine(4, "cuda")
    mesh.use_gpu(3)
    assert used == [0, 3]


@pytest.mark.parametrize(("count", "here"), [(0, 4), (1, 0), (1, 1), (2, 4)])
def test_more_ranks_than_gpus_are_refused_where_they_would_share_them(gpus, count, here):
    gpus(count, here)
    with pytest.raises(UserError, match=f"4 ranks need 4 GPUs and torch sees {count}"):
        layout_limits.check_machine(4, "cuda")


@pytest.mark.whole
@pytest.mark.parametrize("form", ["true", "json"])
def test_a_dry_run_of_several_ranks_needs_no_gpu_for_each(run, gpus, monkeypatch, form):
    gpus(1, here=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention_kernels, "runs", lambda *_: True)
    monkeypatch.setattr(env, "memory_bytes", lambda device: 10**11)
    words = ("parallel=usp4", "device=cuda", "--backend", "sglang")
    done = run("sd3", *words, f"dry_run={form}")
    assert done.code == 0, done.err
    assert "ring 2, ulysses 2" in done.out or '"ring": 2' in done.out
    assert "WARNING: 4 ranks need 4 GPUs and torch sees 1: this machine can plan such a run, not carry it" in done.err
    done = run("sd3", *words)
    assert done.code == 2
    assert "4 ranks need 4 GPUs and torch sees 1; device=cpu runs them as processes" in done.lines[-1]
    gpus(4, here=0)
    assert "ranks need" not in run("sd3", *words, "dry_run=true").err


@pytest.mark.parametrize("count", [0, 2])
def test_a_local_rank_without_a_gpu_says_so(gpus, count):
    gpus(count, here=4)
    with pytest.raises(RunError, match=f"torch sees {count} GPUs here, none for local rank 2"):
        mesh.use_gpu(2)


def test_ranks_that_share_a_gpu_after_all_say_so_in_one_sentence():
    text = (
        "NCCL error in: x.cpp:1, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\n"
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
    )
    with pytest.raises(RunError) as error, mesh.explained("Rank 1 on here", 1.0):
        raise torch.distributed.DistBackendError(text)
    assert str(error.value) == (
        "Rank 1 on here has the same GPU as another rank, which NCCL refuses; start one process for each GPU"
    )


@pytest.fixture
def full(monkeypatch):
    """The second of two GPUs, with this much memory."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (gib // 4, 139 * gib))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA H200 number {index}")


@pytest.fixture
def out_of_memory(pipelines, full):
    """A function that gives what a run on GPUs says on rank 1."""

    def said(*overrides: str, doing: str = "generating", error: str = "CUDA out of memory") -> str:
        planned = plan_of(f"model.path={pipelines['sd3']}", "sampling.prompt=a", *overrides)
        failed = RuntimeError(error)
        return str(memory_error.out_of_memory(replace(planned, device="cuda"), 1, doing, failed))

    return said


PLACE = "on rank 1 (cuda:1, NVIDIA H200 number 1): 0.25 GiB of 139.00 GiB are free"


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ((), "offload=model, a smaller image or quant=int8"),
        (("offload=model",), "offload=layerwise, a smaller image or quant=int8"),
        (("offload=layerwise",), "a smaller image or quant=int8"),
        (
            ("sampling.num_samples=4", "sampling.batch_size=4"),
            "offload=model, a smaller image, smaller batches or quant=int8",
        ),
    ],
)
def test_a_gpu_that_is_full_is_named_with_its_memory_and_what_to_change(out_of_memory, overrides, changes):
    assert out_of_memory(*overrides) == f"Out of memory while generating {PLACE}; run with {changes}"


def test_a_model_that_does_not_fit_is_not_told_to_make_a_smaller_image(out_of_memory):
    sentence = out_of_memory(doing="loading sdxl")
    assert sentence == f"Out of memory while loading sdxl {PLACE}; run with offload=model or quant=int8"
    everything = out_of_memory("offload=layerwise", "quant=int8", "backend=auto", doing="loading sdxl")
    assert everything.endswith("; run with more ranks (parallel.tp_size) or a smaller model")


def test_a_host_that_is_full_is_not_taken_for_the_gpu(out_of_memory):
    sentence = out_of_memory(error="DefaultCPUAllocator: can't allocate memory")
    assert sentence == "Out of memory while generating; try smaller batches or a smaller image"


def test_a_gpu_that_does_not_answer_is_named_all_the_same(out_of_memory, monkeypatch):
    def fail(_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert out_of_memory().startswith("Out of memory while generating on rank 1 (cuda:1); run with ")


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_gpu_that_is_full_ends_a_run_with_that_sentence(run, monkeypatch, full, backend):
    """Of both backends, when they load and when they generate."""
    monkeypatch.setattr(memory_error, "_place", lambda rank: f"on rank {rank} (a GPU)")
    made = memory_error.out_of_memory
    for module in (memory_error, native, diffusers_engine):
        monkeypatch.setattr(module, "out_of_memory", lambda plan, *rest: made(replace(plan, device="cuda"), *rest))

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(
        *{"sglang": (native, "denoise"), "diffusers": (SD3Transformer2DModel, "forward")}[backend], fail
    )
    done = run("sd3", "--backend", backend)
    assert done.code == 1
    assert "ERROR: Out of memory while generating on rank 0 (a GPU); run with offload=model, " in done.lines[-1]
    monkeypatch.setattr(*{"sglang": (native, "build"), "diffusers": (diffusers_engine, "_read")}[backend], fail)
    done = run("sd3", "--backend", backend)
    assert done.code == 1
    assert re.search(
        r"ERROR: Out of memory while loading \S+ on rank 0 \(a GPU\); run with offload=model or ", done.lines[-1]
    )
