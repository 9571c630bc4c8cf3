"""Whole runs of the native engine with its networks spread over ranks: the pictures of one process."""

import json
import shutil
from math import prod
from pathlib import Path

import pytest
from cases import mostly_slow
from native import BETAS
from PIL import Image
from rank_runs import assert_as_predicted, assert_every_rank_as_predicted, assert_same, record

BATCH = ("--num-samples", "3", "sampling.batch_size=3", "--backend", "sglang")
TRUE_CFG = ("--negative-prompt", "a dog", "--diffusers-kwargs", '{"true_cfg_scale": 3.0}')
T5 = ("sd3", "flux")
RUNS = mostly_slow(
    [
        ("sdxl", "parallel=sp2_tp2", ("--guidance-scale", "3", "--height", "36", "--width", "44")),
        ("sdxl", "parallel=cfg2_sp2_tp2", ("--guidance-scale", "3")),
        ("sd15", "parallel=ulysses2", ("--height", "40", "--negative-prompt", "a dog")),
        ("sd3", "parallel=cfg2_sp2", ("--height", "36", "--width", "20")),
        ("sd3", "parallel=usp4", ("--guidance-scale", "1")),
        ("sd3", "parallel=cfg2", ("sampling.guidance_interval=[0.5,1]",)),
        ("sd15", "parallel=cfg2", ("--negative-prompt", "a dog")),
        ("sd3", "parallel=tp2", ("--guidance-scale", "3", "--negative-prompt", "a dog")),
        ("flux", "parallel=tp2", ()),
        ("flux", "parallel=cfg2_sp2", TRUE_CFG),
        ("flux", "parallel.ring_degree=4", ("--height", "20", "--width", "44")),
    ],
    ("sdxl", "parallel=sp2_tp2", ("--guidance-scale", "3", "--height", "36", "--width", "44")),
    ("sd3", "parallel=usp4", ("--guidance-scale", "1")),
    ("sd3", "parallel=cfg2", ("sampling.guidance_interval=[0.5,1]",)),
    ("sd3", "parallel=tp2", ("--guidance-scale", "3", "--negative-prompt", "a dog")),
    ("flux", "parallel=tp2", ()),
)


@pytest.mark.parametrize(("name", "layout", "words"), RUNS)
def test_a_split_run_gives_the_pictures_of_one_process(run_on_ranks, name, layout, words):
    assert run_on_ranks(name, *BATCH, *words, "--output-path", "one").code == 0
    done = run_on_ranks(name, *BATCH, *words, layout, "--output-path", "many", "--perf-dump-path", "many.json")
    assert done.code == 0, done.err
    assert_same("many", "one", 3)
    dump = json.loads(Path("many.json").read_text())
    assert dump["comm"]["denoising"]["evaluations"] >= 2
    assert_every_rank_as_predicted(dump, prod(dump["effective"]["parallel"].values()))
    t5 = dump["comm"].get("text_encoding", {"evaluations": 0})  # it has parts, and reads the negative prompts first
    assert t5["evaluations"] == (1 + ("--negative-prompt" in words) if "tp2" in layout and name in T5 else 0)


@pytest.mark.parametrize(("name", "layout"), [("sd15", "parallel=ring2"), ("sd3", "parallel=ulysses2")])
def test_a_picture_and_given_noise_are_where_split_runs_start_too(run_on_ranks, name, layout):
    Image.effect_noise((48, 40), 90).convert("RGB").save("photo.png")
    noise = "sampling.latents=first/generated_image_0.safetensors"
    assert run_on_ranks(name, "--backend", "sglang", "--output-path", "first").code == 0
    for start in (("--image-path", "photo.png"), (noise,)):
        for words, folder in (((), "one"), ((layout,), "many")):
            done = run_on_ranks(name, "--backend", "sglang", *start, *words, "--output-path", f"{folder}{len(start)}")
            assert done.code == 0, done.err
        assert_same(f"many{len(start)}", f"one{len(start)}", 1)


def test_a_picture_of_fewer_rows_than_ranks_is_refused_once_it_is_read(run_on_ranks):
    Image.new("RGB", (48, 4)).save("flat.png")
    done = run_on_ranks("sd15", "--image-path", "flat.png", "parallel=ring2")
    assert (done.code, "this image has 1 bands of" in done.lines[-1]) == (2, True), done.err


@pytest.mark.slow
def test_an_autoencoder_that_decodes_in_float32_sends_what_was_predicted(run_on_ranks):
    done = run_on_ranks(
        "sdxl", "--backend", "sglang", "parallel=ring2", "--perf-dump-path", "half.json", dtype="float16"
    )
    assert done.code == 0, done.err
    dump = json.loads(Path("half.json").read_text())
    assert dump["work"]["decoding"]["flops"] > 0
    decoding = dump["comm"]["decoding"]
    assert decoding["collectives"]
    assert_as_predicted(decoding)


def test_the_work_of_t5_is_that_of_this_ranks_part(run_on_ranks):
    work = {}
    for layout in ("parallel=single", "parallel=tp2"):
        words = ("--backend", "sglang", layout, "--perf-dump-path", "perf.json", "perf.machine_rates=false")
        assert run_on_ranks("flux", *words).code == 0
        work[layout] = json.loads(Path("perf.json").read_text())["work"]["text_encoding"]["flops"]
    assert 0.5 < work["parallel=tp2"] / work["parallel=single"] < 0.9  # CLIP is whole on both


@pytest.mark.slow
def test_a_step_that_waits_for_other_ranks_is_bound_by_them_and_repeats_send_nothing_more(run_on_ranks):
    words = ("sd15", "--backend", "sglang", "parallel=ring2", "--perf-dump-path", "perf.json")
    found = []
    for more in ((), ("perf.repeat=2",), ("machine=h200", "machine.link_gb_per_s=1e-6")):
        done = run_on_ranks(*words, *more, dtype="bfloat16")
        assert done.code == 0, done.err
        found.append(json.loads(Path("perf.json").read_text()))
    measured, repeated, slow = found
    assert measured["machine"]["rates"]["link_gb_per_s"] > 0
    assert measured["comm"] == repeated["comm"]
    assert {name: entry["bound"] for name, entry in slow["work"].items()} == {
        "text_encoding": "launch", "denoising": "comm", "decoding": "comm",
    }  # fmt: skip


STOCHASTIC = [
    ("sd3", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "stochastic_sampling": True}, "sp2"),
    ("sd3", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "stochastic_sampling": True}, "cfg2"),
    ("sd15", {"_class_name": "DPMSolverSDEScheduler", **BETAS}, "tp2"),
    ("sd15", {"_class_name": "DPMSolverSDEScheduler", **BETAS}, "ring2"),
]


@pytest.mark.filterwarnings("ignore:Should have ta>=t0:UserWarning")  # torchsde, of a bound in single precision
@pytest.mark.parametrize(("name", "scheduler", "layout"), mostly_slow(STOCHASTIC, *STOCHASTIC[1:3]))
def test_noise_that_is_drawn_in_every_step_is_the_same_on_all_ranks(run_on_ranks, pipelines, name, scheduler, layout):
    shutil.copytree(pipelines[name], "stochastic")
    index = json.loads(Path("stochastic/model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    Path("stochastic/model_index.json").write_text(json.dumps(index))
    Path("stochastic/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    words = ("--num-samples", "2", "sampling.batch_size=2", "--guidance-scale", "3", "--backend", "sglang")
    assert run_on_ranks("./stochastic", *words, "--output-path", "one").code == 0
    done = run_on_ranks("./stochastic", *words, f"parallel={layout}", "--output-path", "two")
    assert done.code == 0, done.err
    assert_same("two", "one", 2)
    kept = record("two")["effective"]["scheduler_config"]
    assert all(kept[key] == value for key, value in scheduler.items() if not key.startswith("_"))


@pytest.mark.slow
def test_every_axis_with_a_stochastic_scheduler_gives_the_pictures_of_one_process(run_on_ranks, pipelines):
    shutil.copytree(pipelines["sdxl"], "ancestral")
    index = json.loads(Path("ancestral/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerAncestralDiscreteScheduler"]
    Path("ancestral/model_index.json").write_text(json.dumps(index))
    words = ("--num-samples", "3", "sampling.batch_size=2", "--guidance-scale", "3", "--backend", "sglang")
    assert run_on_ranks("./ancestral", *words, "--output-path", "one").code == 0
    layout = ("--num-gpus", "8", "--dp-size", "2", "--tp-size", "2", "--ring-degree", "2")
    done = run_on_ranks("./ancestral", *words, *layout, "--output-path", "eight")
    assert done.code == 0, done.err
    assert_same("eight", "one", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("sdxl", "parallel=ring2"),
        ("sd3", "parallel=ulysses2"),
        ("sd3", "parallel=ring2"),
        ("flux", "parallel=ring2"),
        ("flux", "parallel=tp2"),
        ("flux", "parallel=usp4"),
        ("flux", "parallel=sp2_tp2"),
    ],
)
def test_collectives_inside_compiled_blocks_give_the_same_and_are_counted(run_on_ranks, name, layout):
    words = ("--backend", "sglang", "--guidance-scale", "3", layout)
    assert run_on_ranks(name, *words, "--output-path", "eager").code == 0
    done = run_on_ranks(
        name, *words, "compile=regional", "--output-path", "compiled", "--perf-dump-path", "compiled.json"
    )
    assert done.code == 0, done.err
    assert_same("compiled", "eager", 1)
    dump = json.loads(Path("compiled.json").read_text())
    assert dump["effective"]["compile"] == "regional"
    assert_every_rank_as_predicted(dump, 4 if layout in ("parallel=usp4", "parallel=sp2_tp2") else 2)
    if layout == "parallel=ring2" and name != "sdxl":  # keys and values come by and are merged: none is gathered
        assert "all_to_all ring" in dump["comm"]["denoising"]["collectives"]


def test_a_kernel_without_log_sum_exp_sends_what_was_predicted(run_on_ranks):
    """Its keys and values are gathered, not passed from rank to rank."""
    order = "attention.backend_config={priority: [math]}"
    done = run_on_ranks("sd3", "parallel=ring2", "attention=sdpa", order, "--perf-dump-path", "dump.json")
    assert done.code == 0, done.err
    dump = json.loads(Path("dump.json").read_text())
    assert dump["effective"]["ring"] == "gathered"
    assert "all_gather ring" in dump["comm"]["denoising"]["collectives"]
    assert_every_rank_as_predicted(dump, 2)
