"""Jobs of a sweep that share weights: what the second computes is bit for bit what it computes alone."""

import os
import shutil
import signal
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from cases import mostly_whole
from safetensors.torch import load_file, save_file
from whole import plan_of

from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.errors import RunError, UserError
from sglang_gen.generate import execute
from sglang_gen.launch import kept_weights
from sglang_gen.launch.session import Session
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.types import Layout

USUAL = ("dtype=float32", "sampling.height=32", "sampling.width=32", "sampling.num_inference_steps=3",
         "sampling.seed=7", "sampling.prompt=a cat", "perf.machine_rates=false", "perf.work=false")  # fmt: skip


@pytest.fixture
def session():
    made = Session()
    yield made
    made.close()


@pytest.fixture
def run(pipelines):
    """The result of a run of a tiny pipeline, in a session or (None) alone."""

    def generate(session: Session | None, name: str, *words: str):
        given = {word.partition("=")[0]: word for word in (*USUAL, f"model.path={pipelines[name]}", *words)}
        return execute(compose(Choices(tuple(given.values()))), session)

    return generate


def reused(result) -> bool:
    return result.report["load"]["reused"]


def assert_equal(result, other) -> None:
    assert all((a == b).all() for a, b in zip(result.frames, other.frames, strict=True))


@pytest.mark.parametrize("backend", ["backend=sglang", "backend=diffusers"])
@pytest.mark.parametrize("name", mostly_whole(["sd15", "sdxl", "sd3", "flux"], "sd15"))
def test_a_second_job_takes_the_weights_of_the_first_and_makes_the_images_of_a_fresh_one(run, session, name, backend):
    assert not reused(run(session, name, backend))
    other = ("sampling.guidance_scale=2", "sampling.seed=3", backend)
    again = run(session, name, *other)
    assert reused(again)
    assert_equal(again, run(None, name, *other))


CHANGES = {
    "a kernel": ("attention=math",),
    "half precision": ("dtype=bfloat16", "backend=sglang"),
    "a cache": ("backend=diffusers", "cache=dbcache", "cache.Fn_compute_blocks=1", "cache.max_warmup_steps=1",
                "cache.residual_diff_threshold=0.9"),
    "int8": ("quant=int8", "dtype=bfloat16", "backend=diffusers"),
    "another scheduler": ("+backend.diffusers_kwargs.shift=5", "backend=diffusers"),
    "timed blocks": ("perf.blocks=true", "backend=sglang"),
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_job_does_to_its_network_is_not_done_to_the_next(run, session, change):
    """The first job has the change, and the last has neither the change nor anything of it."""
    settled = [word for word in change if word.startswith(("dtype=", "backend="))]
    first = run(session, "flux", *change)
    last = run(session, "flux", *settled)
    assert reused(last) is (change != CHANGES["int8"])
    assert_equal(last, run(None, "flux", *settled))
    assert_equal(first, run(None, "flux", *change))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "compiled"), [("backend=sglang", "compile=full"), ("backend=diffusers", "compile=regional")]
)
def test_a_compiled_job_leaves_an_eager_one_as_it_was(run, session, backend, compiled):
    run(session, "sdxl", compiled, backend)
    last = run(session, "sdxl", backend)
    assert reused(last)
    assert_equal(last, run(None, "sdxl", backend))


@pytest.mark.whole
@pytest.mark.parametrize("words", [("dtype=bfloat16",), ("backend=diffusers",), ("quant=int8", "dtype=bfloat16")])
def test_a_job_that_needs_other_weights_loads_them(run, session, words):
    run(session, "flux", "backend=sglang")
    assert not reused(run(session, "flux", *words))


@pytest.mark.whole
def test_a_merged_adapter_is_never_in_the_weights_of_another_job(run, session, pipelines):
    plain = run(session, "sd15", "backend=diffusers")
    network = diffusers.UNet2DConditionModel.from_pretrained(pipelines["sd15"] / "unet")
    name, layer = next((name, each) for name, each in network.named_modules() if name.endswith("attn1.to_q"))
    width = layer.in_features
    save_file(
        {f"unet.{name}.lora_A.weight": torch.randn(4, width), f"unet.{name}.lora_B.weight": torch.randn(width, 4)},
        "a.safetensors",
    )
    merged = run(session, "sd15", "backend=diffusers", "lora.path=./a.safetensors")
    assert not reused(merged)
    assert not (merged.frames[0] == plain.frames[0]).all()
    after = run(session, "sd15", "backend=diffusers")
    assert not reused(after)
    assert_equal(after, plain)


@pytest.mark.whole
def test_weights_that_changed_on_disk_are_loaded_again(run, session, pipelines, tmp_path):
    folder = f"model.path={shutil.copytree(pipelines['sd15'], tmp_path / 'model')}"
    first = run(session, "sd15", folder)
    (file,) = (tmp_path / "model" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, file, {"format": "pt"})
    changed = run(session, "sd15", folder)
    assert not reused(changed)
    assert not (changed.frames[0] == first.frames[0]).all()


def test_encoders_that_leave_a_full_device_are_not_kept_on_it(run, session, monkeypatch):
    monkeypatch.setattr("sglang_gen.backends.native.memory_policy.free_memory", lambda device: 10**5)
    monkeypatch.setattr("sglang_gen.backends.native.engine.stored_bytes", lambda tensor: 10**8)
    result = run(session, "sdxl", "backend=sglang")
    assert result.report["effective"]["released"] == ["text_encoder", "text_encoder_2"]
    assert "components" not in session._ranks.kept._loaded
    again = run(session, "sdxl", "backend=sglang")
    assert_equal(again, result)


def test_a_copy_has_its_own_modules_and_hooks_and_the_memory_of_the_first(monkeypatch):
    monkeypatch.setattr(kept_weights, "_identity", lambda plan, mesh: plan)
    kept = kept_weights.KeptWeights(keeps=True)
    kept.start("a", None)
    first = kept.load("network", lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    first[0].register_forward_hook(lambda *_: 0)
    first[1].running_mean += 1
    kept.start("a", None)
    second = kept.load("network", lambda: pytest.fail("read again"))
    assert kept.reused
    assert second[0].weight.data_ptr() == first[0].weight.data_ptr()
    assert not second[0]._forward_hooks
    assert not second[1].running_mean.any()
    kept.start("b", None)
    assert kept.load("network", lambda: torch.nn.Linear(1, 1)).weight.numel() == 1
    assert not kept.reused


def test_a_run_outside_of_a_sweep_keeps_nothing(run, monkeypatch):
    monkeypatch.setattr(kept_weights, "_sharing_copy", lambda _: pytest.fail("a copy"))
    assert not reused(run(None, "sd15"))


def test_shards_are_not_kept_for_a_group_of_another_name(pipelines):
    """The ranks of two layouts may form the same groups in another order, and text encoders keep the name of theirs."""
    plan = plan_of(f"model.path={pipelines['sd3']}", "sampling.prompt=a", "parallel=tp2")
    identities = [
        kept_weights._identity(plan, Mesh(Layout(tp=2), 0, {"tp": SimpleNamespace(group_name=name)})) for name in "353"
    ]
    assert identities[0] == identities[2] != identities[1]


@pytest.fixture
def counted(pool, monkeypatch):
    """The shared ranks in place of new ones; how often they were opened, with how many."""
    from contextlib import contextmanager

    from sglang_gen.launch import launcher

    opened = []

    @contextmanager
    def open_ranks(count, device):
        opened.append(count)
        with pool.open(count, device) as ranks:
            monkeypatch.setattr(ranks, "fit", lambda plan: plan.layout.ranks == count)
            yield ranks

    monkeypatch.setattr(launcher, "open_ranks", open_ranks)
    return opened


@pytest.mark.slow
def test_jobs_of_as_many_ranks_share_processes_and_those_of_the_same_shard_weights(run, session, counted):
    first = run(session, "sd15", "parallel=tp2", "sampling.seed=3")
    second = run(session, "sd15", "parallel=tp2")
    assert (reused(first), reused(second)) == (False, True)
    rows = run(session, "sd15", "parallel=sp2")
    columns = run(session, "sd15", "parallel=ring2")
    assert (reused(rows), reused(columns)) == (False, True)
    assert counted == [2]
    alone = run(session, "sd15")
    assert np.abs(alone.frames[0].astype(int) - rows.frames[0]).max() <= 1


@pytest.mark.slow
def test_a_job_that_fails_on_ranks_leaves_none_of_them_to_the_next(run, session):
    first = run(session, "sd15", "parallel=tp2")
    with pytest.raises(UserError):
        run(session, "sd15", "parallel=tp2", "sampling.latents=nothing.safetensors")
    again = run(session, "sd15", "parallel=tp2")
    assert not reused(again)
    assert_equal(again, first)


@pytest.mark.whole
def test_a_job_of_one_rank_that_is_killed_ends_neither_the_session_nor_the_next(run, session, counted, processes):
    first = run(session, "sd15")
    assert reused(run(session, "sd15"))
    assert counted == [1]
    assert first.report["ranks"][0]["host_anon_loading_mb"]
    os.kill(session._ranks.processes[0].pid, signal.SIGKILL)
    with pytest.raises(RunError, match="Rank 0 was ended by SIGKILL; it may have run out of memory"):
        run(session, "sd15")
    last = run(session, "sd15")
    assert not reused(last)
    assert_equal(last, first)


@pytest.mark.slow
def test_a_fresh_job_is_a_process_of_its_own(run, session):
    shared = run(session, "sd15")
    fresh = run(session, "sd15", "sweep.fresh=true")
    assert not reused(fresh)
    assert_equal(fresh, shared)
