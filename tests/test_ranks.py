"""Several ranks: processes with gloo, and the same pictures as one process."""

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from cases import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_runs import assert_same, record

from sglang_gen.errors import LostError, RunError
from sglang_gen.parallel.guidance_split import rounds
from sglang_gen.parallel.mesh import AXES, coordinates, explained, members
from sglang_gen.types import Layout


def test_data_parallel_groups_share_the_pictures_and_keep_their_order(run_on_ranks):
    words = ("--num-samples", "3")
    assert run_on_ranks("sdxl", *words, "--output-path", "one").code == 0
    done = run_on_ranks("sdxl", *words, "--output-path", "two", "parallel=dp2", "--perf-dump-path", "two.json")
    assert done.code == 0, done.err
    assert_same("two", "one", 3)
    assert [line for line in done.lines if "saved to: two/" in line] == [
        f"INFO: Generated image saved to: two/generated_image_{number}.png" for number in range(3)
    ]
    dump = json.loads(Path("two.json").read_text())
    assert [rank["rank"] for rank in dump["ranks"]] == [0, 1]
    assert all(rank["stages_ms"]["denoising"] > 0 and rank["peak_host_anon_mb"] > 0 for rank in dump["ranks"])
    assert {batch["batch"] for batch in dump["denoise_steps_ms"]} == {0, 2}  # rank 0's own
    assert record("two")["effective"]["parallel"] == {"dp": 2, "cfg": 1, "ring": 1, "ulysses": 1, "tp": 1}


@pytest.mark.parametrize("name", mostly_slow(["sd15", "sdxl", "sd3"], "sdxl"))
def test_guidance_branches_on_two_ranks_give_the_picture_of_one(run_on_ranks, name):
    words = ("--num-samples", "2", "sampling.batch_size=2", "--negative-prompt", "a dog", "--backend", "diffusers",
             "--perf-dump-path")  # fmt: skip
    assert run_on_ranks(name, "--output-path", "one", *words, "one.json").code == 0
    done = run_on_ranks(name, "--output-path", "two", *words, "two.json", "parallel=cfg2")
    assert done.code == 0, done.err
    assert_same("two", "one", 2)
    one, two = (json.loads(Path(path).read_text())["work"]["denoising"]["flops"] for path in ("one.json", "two.json"))
    assert two == one / 2  # rank 0's own share
    sent = json.loads(Path("two.json").read_text())["comm"]["denoising"]
    assert sent["collectives"]["all_gather cfg"]["count"] == {"sd15": 3}.get(name, 2)  # PNDM's first step is two


@pytest.mark.slow
def test_data_and_guidance_parallel_compose_with_a_stochastic_scheduler(run_on_ranks, pipelines):
    shutil.copytree(pipelines["sdxl"], "ancestral")
    index = json.loads(Path("ancestral/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerAncestralDiscreteScheduler"]
    Path("ancestral/model_index.json").write_text(json.dumps(index))
    words = ("--num-samples", "3", "sampling.batch_size=2")
    assert run_on_ranks("./ancestral", *words, "--output-path", "one").code == 0
    four = ("parallel.dp_size=2", "parallel.enable_cfg_parallel=true")
    done = run_on_ranks("./ancestral", *words, "--output-path", "four", *four)
    assert done.code == 0, done.err
    assert_same("four", "one", 3)


def test_a_pipeline_that_does_not_batch_its_branches_is_refused(run_on_ranks):
    done = run_on_ranks("flux", "parallel=cfg2", "--backend", "diffusers")
    assert done.code == 2
    assert "does not give FluxTransformer2DModel both guidance branches in one batch" in done.err
    assert [line for line in done.lines if line.startswith("ERROR: ")] == done.lines[-1:]


def test_an_error_of_every_rank_is_said_once(run_on_ranks):
    done = run_on_ranks("sdxl", "parallel=cfg2", "--lora-path", "./missing.safetensors")
    assert (done.code, [line for line in done.lines if "missing.safetensors" in line]) == (
        2, ["ERROR: lora: ./missing.safetensors does not exist"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("parallel=tp2", "--backend", "diffusers"), "The diffusers backend does not split a network over ranks"),
        (
            ("parallel=sp2_tp2", "--diffusers-kwargs", '{"clip_skip": 1}'),
            "native engine, which cannot run this: 'clip",
        ),
        (("--tp-size", "8"), "parallel.tp_size is 8 and this network has layers of 4 heads: take tp_size 1, 2 or 4"),
        (("parallel.sp_degree=4", "attention=flex"), "attention=flex depends on the positions of tokens in the image"),
        (("parallel=dp2",), "parallel.dp_size is 2 and the run has 1 batch of images"),
        (("parallel=cfg2", "--guidance-scale", "1.0"), "without guidance (--guidance-scale 1.0) there is one branch"),
        (
            ("parallel=cfg2", "cache=dbcache", "--backend", "diffusers"),
            "enable_cfg_parallel and a step cache exclude each other",
        ),
    ],
)
def test_a_layout_that_nothing_can_fill_is_refused_before_loading(run_on_ranks, words, sentence):
    done = run_on_ranks("sdxl", *words)
    assert (done.code, sentence in done.err) == (2, True), done.err
    assert not Path("outputs").exists()


DEGREES = st.builds(Layout, *(st.integers(1, 4) for _ in AXES))


@settings(deadline=None)
@given(DEGREES, st.sampled_from(AXES))
def test_the_groups_of_an_axis_hold_every_rank_once_in_the_order_of_the_axis(layout, axis):
    groups = members(layout, axis)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.ranks))
    for group in groups:
        places = [coordinates(layout, rank) for rank in group]
        assert [place[axis] for place in places] == list(range(getattr(layout, axis)))
        assert len({tuple(place[name] for name in AXES if name != axis) for place in places}) == 1


@given(st.lists(st.integers()), st.integers(1, 5))
def test_rounds_deal_every_batch_once_and_in_order(batches, groups):
    dealt = rounds(batches, groups)
    assert [item for turn in dealt for item in turn] == list(enumerate(batches))
    assert all(len(turn) == groups for turn in dealt[:-1])


def test_each_group_warns_of_its_own_pictures_and_what_all_say_is_said_once(run_on_ranks, pool):
    long = " ".join(["lake"] * 90)
    Path("prompts.txt").write_text(f"a lake\n{long} at dawn\n")
    words = ("sampling.prompts_file=prompts.txt", "sampling.batch_size=1", "parallel=dp2", "--fps", "8")
    done = run_on_ranks("sd15", *words, prompt=None)
    assert done.code == 0, done.err
    warnings = [line for line in done.lines if line.startswith("WARNING: ")]
    assert sum("does not see" in line for line in warnings) == 1
    assert len(warnings) == len(set(warnings))


def test_what_gloo_does_not_find_here_is_not_taken_for_another_ranks_end():
    text = "[enforce fail at /a/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: nope0"
    with pytest.raises(RunError) as error, explained("Rank 0", 1.0):
        raise RuntimeError(text)
    assert type(error.value) is RunError
    assert str(error.value).startswith("Rank 0 cannot open connections to other ranks (--log-level debug")


def test_what_fails_in_nccl_is_not_taken_for_another_ranks_end():
    near = "NCCL error in: x.cpp:1, unhandled system error\nLast error:\nError while creating shared memory segment"
    far = "NCCL error in: x.cpp:1, remote process exited or there was a network error"
    for text, kind, sentence in ((near, RunError, "failed in NCCL "), (far, LostError, "lost")):
        with pytest.raises(RunError, match=sentence) as error, explained("Rank 0", 1.0):
            raise dist.DistBackendError(text)
        assert type(error.value) is kind
