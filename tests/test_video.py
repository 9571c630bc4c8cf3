"""A family that makes videos with two denoising networks, from the plan to the file, on one process and on ranks."""

import json
import re
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tiny
import torch
import video_runs
from diffusers import FlowMatchEulerDiscreteScheduler
from moving_family.pipeline import PIPELINE
from moving_family.spec import SPEC
from native import error
from rank_runs import assert_every_rank_as_predicted
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from sglang_gen.engine import attention_autotune
from sglang_gen.engine.cfg import Guidance, kinds
from sglang_gen.families.contract import Video
from sglang_gen.launch import launcher
from sglang_gen.outputs import video_audio
from sglang_gen.perf import dump, flops

STEPS, SCALE = 4, 3.0
SIDES = ("--height", 16, "--width", 24)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    video_runs.register(monkeypatch)


@pytest.fixture(scope="module")
def model(pipelines, tmp_path_factory):
    return video_runs.save_model(tmp_path_factory.mktemp("moving") / "model", pipelines["sd15"])


@pytest.fixture
def run(sglang, model, request, monkeypatch):
    """Make a video; ffmpeg, which is a process, is left out of `make check`."""
    if not request.node.get_closest_marker("whole"):
        monkeypatch.setattr(video_audio, "_write_mp4", lambda frames, fps, file, record: file.write(frames.tobytes()))

    def generate(*words: object, folder: str = "outputs", sides=SIDES, path=model):
        return sglang("generate", "--model-path", path, "--backend", "sglang", "--prompt", "a fox runs", *sides,
                      "--num-inference-steps", STEPS, "--guidance-scale", SCALE, "--seed", 7,
                      "output.latents=true", "--output-path", folder, *words)  # fmt: skip

    return generate


def latents(folder: str, number: int = 0) -> np.ndarray:
    return load_file(f"{folder}/generated_video_{number}.safetensors")["latents"].float().numpy()


def record(folder: str, number: int = 0) -> dict:
    return json.loads(Path(f"{folder}/generated_video_{number}.json").read_text())


def networks() -> list:
    return [tiny.fill(PIPELINE(SPEC).build(video_runs.CONFIG), 81 + number) for number in (0, 1)]


@torch.no_grad()
def by_hand(model: Path, chosen, seed: int = 7, latent_frames: int = 3) -> np.ndarray:
    """Final latents of a plain loop; `chosen(timestep)` is the network of a timestep."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    ids = tokenizer(["", "a fox runs"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    text, size = encoder(ids)[0], (latent_frames, 8, 12)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        network = chosen(timestep)
        conditioning = network.condition(timestep[None], text, *size)
        without, with_text = network(torch.cat([x, x]), conditioning, 0).chunk(2)
        x = scheduler.step(without + SCALE * (with_text - without), timestep, x, return_dict=False)[0]
    return x[0].numpy()


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio's reader leaves its pipe to the garbage collector
def test_a_video_has_the_frames_and_the_size_that_were_asked_for(run, model):
    done = run("--num-frames", 5, "--fps", 8)
    assert done.code == 0, done.err
    assert "WARNING" not in done.err
    read = imageio.imread("outputs/generated_video_0.mp4")
    assert read.shape == (5, 16, 24, 3)
    effective = record("outputs")["effective"]
    assert [effective[name] for name in ("num_frames", "height", "width", "fps", "makes")] == [5, 16, 24, 8, "video"]
    assert effective["components"]["transformer_2"] == effective["components"]["transformer"] == "Moving"


def test_each_network_computes_the_timesteps_on_its_side_of_the_boundary(run, model):
    assert run().code == 0
    high, low = networks()
    expected = by_hand(model, lambda timestep: high if timestep >= 1000 * video_runs.BOUNDARY else low)
    assert error(latents("outputs"), expected) <= 1e-5
    assert error(by_hand(model, lambda _: high), expected) > 1e-2


def test_a_model_with_the_first_network_alone_uses_it_throughout(run, pipelines):
    alone = video_runs.save_model(Path("alone"), pipelines["sd15"], networks=1)
    done = run(path=alone)
    assert done.code == 0, done.err
    high, _ = networks()
    assert error(latents("outputs"), by_hand(alone, lambda _: high)) <= 1e-5
    assert "transformer_2" not in record("outputs")["effective"]["components"]


def test_size_and_frames_default_to_those_of_the_family(run):
    assert run(sides=()).code == 0
    effective = record("outputs")["effective"]
    assert [effective[name] for name in ("num_frames", "height", "width")] == [5, 16, 24]


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (3, 2), (9, 5)])
def test_a_number_of_frames_decides_how_many_latent_frames_there_are(run, frames, latent_frames):
    done = run("--num-frames", frames)
    assert done.code == 0, done.err
    assert latents("outputs").shape == (4, latent_frames, 8, 12)
    assert record("outputs")["effective"]["num_frames"] == frames


def test_saved_noise_of_a_video_starts_the_same_video_and_none_of_another_length(run):
    assert run().code == 0
    noise = "sampling.latents=outputs/generated_video_0.safetensors"
    assert run(noise, folder="again").code == 0
    assert error(latents("again"), latents("outputs")) == 0
    done = run(noise, "--num-frames", 3)
    assert done.code == 2
    assert "holds noise of shape [1, 4, 3, 8, 12], this request starts from [1, 4, 2, 8, 12]" in done.err


def test_a_video_without_frames_between_latents_has_one_latent_frame_for_each():
    assert [Video(5).latent_frames(count) for count in (1, 2, 7)] == [1, 2, 7]
    assert [count for count in range(1, 12) if Video(5, step=4).allows(count)] == [1, 5, 9]


REFUSALS = {
    "frames that are no whole latents": (
        ("--num-frames", 6),
        "sampling.num_frames is 6; this model takes multiples of 2 plus 1, such as 5 or 7",
    ),
    "sequence parallelism": (
        ("parallel.ulysses_degree=2",),
        "Sequence parallelism (dp 1, cfg 1, ring 1, ulysses 2, tp 1) does not split the frames of a video yet, and "
        "MovingPipeline makes video; use tp_size, dp_size or enable_cfg_parallel",
    ),
    "a ring": (("parallel.ring_degree=2",), "does not split the frames of a video yet"),
    "patterns of rows and columns": (
        ("attention=flex",),
        "attention=flex supports only images, and MovingPipeline generates video; use another kernel",
    ),
    "an input image": (("--image-path", "fox.png"), "it does not start a video from an input image yet"),
    "a reference image": (
        ("quality.reference=before",),
        "quality.reference compares images, and MovingPipeline makes video",
    ),
    "more heads than there are": (("parallel.tp_size=3",), "this network has layers of 4 heads"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_takes_no_frames_yet_is_refused_by_name_in_a_dry_run_too(run, name):
    words, sentence = REFUSALS[name]
    for dry in ((), ("dry_run=true",)):
        done = run(*words, *dry)
        assert done.code == 2
        assert sentence in done.err


def test_parity_of_a_video_is_refused(sglang, model):
    done = sglang("debug", "parity", "--model-path", model, "--prompt", "a", *SIDES)
    assert done.code == 2
    assert "runs both backends, and only the native engine has MovingPipeline" in done.err


@pytest.mark.whole
def test_an_estimate_has_the_weights_of_each_network_and_the_frames(run):
    done = run("dry_run=json", "--num-frames", 9)
    assert done.code == 0, done.err
    weights = json.loads(done.out)["estimate"]["memory"]["weights"]
    assert weights["transformer"] == weights["transformer_2"] == sum(x.nbytes for x in networks()[0].parameters())
    few, many = (json.loads(run("dry_run=json", "--num-frames", frames).out)["estimate"] for frames in (1, 9))
    assert few["step"]["flops"] < many["step"]["flops"]
    assert 2 * few["memory"]["alive"]["decoding"] < many["memory"]["alive"]["decoding"]
    assert re.search(r"^frames +9$", run("dry_run=true", "--num-frames", 9).out, re.MULTILINE)


def test_the_calls_of_each_network_are_counted(run, monkeypatch):
    seen = []
    work = dump.work
    monkeypatch.setattr(dump, "work", lambda log, *rest: (seen.append(log), work(log, *rest))[1])
    assert run("--perf-dump-path", "dump.json", "perf.machine_rates=false").code == 0
    calls = [call for call in seen[0].calls.values() if call.network.stage == "denoising"]
    evaluations = {call.network.name: call.count for call in calls if call.method == "forward"}
    assert evaluations == {"transformer": 3, "transformer_2": 1}
    assert sorted(call.network.name for call in calls if call.method == "condition") == list(SPEC.networks)
    counted = json.loads(Path("dump.json").read_text())["work"]["denoising"]["flops"]
    assert counted == sum(flops.count(call)[0] * call.count for call in calls)


@pytest.fixture
def run_on_ranks(run, ranks, monkeypatch):
    monkeypatch.setattr(launcher, "open_ranks", video_runs.OnPool(ranks).open)
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # imageio's reader, see above
@pytest.mark.parametrize(
    ("layout", "count"),
    [("parallel.dp_size=2", 2), ("parallel.enable_cfg_parallel=true", 2),
     pytest.param("parallel.tp_size=2", 2, marks=pytest.mark.slow),
     pytest.param("parallel.tp_size=2 parallel.dp_size=2", 4, marks=pytest.mark.slow)],
)  # fmt: skip
def test_ranks_make_the_videos_of_one_process(run, run_on_ranks, monkeypatch, layout, count):
    """Both networks are split; what each rank sends was expected of it."""
    words = ("--num-samples", 2, "--num-frames", 3)
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "open_ranks", None)
        assert run(*words, folder="alone").code == 0
    done = run_on_ranks(*words, *layout.split(), f"parallel.num_gpus={count}", "--perf-dump-path", "dump.json")
    assert done.code == 0, done.err
    for number in (0, 1):
        assert error(latents("outputs", number), latents("alone", number)) <= 1e-5
        ours, alone = (imageio.imread(f"{folder}/generated_video_{number}.mp4") for folder in ("outputs", "alone"))
        assert ours.shape == alone.shape == (3, 16, 24, 3)
    report = json.loads(Path("dump.json").read_text())
    assert len(report["ranks"]) == count
    if "dp_size" not in layout:
        assert_every_rank_as_predicted(report, count)


def test_both_networks_are_compiled_and_count_each_others_graphs(run, traced):
    """The first computes guided steps alone, the second unguided ones: one class of blocks, two graphs."""
    words = ("sampling.guidance_interval=[0, 0.75]", "compile.warmup=false")
    assert run(*words, folder="eager").code == 0
    done = run(*words, "compile=regional", folder="compiled")
    assert done.code == 0, done.err
    assert len(traced) == 2
    assert error(latents("compiled"), latents("eager")) <= 1e-5


def test_one_kernel_is_chosen_on_the_shapes_of_both_networks_and_a_record_pins_it(run, sglang, monkeypatch):
    timed = []
    monkeypatch.setattr(attention_autotune, "fastest", lambda kernels, shapes, *_: timed.append(shapes) or "math")
    done = run("dtype=bfloat16")
    assert done.code == 0, done.err
    tokens, rows, heads = 77 + 3 * 8 * 12, 2, 4
    both = 2 * video_runs.CONFIG["num_layers"]
    assert timed == [{(rows, heads, tokens, tokens, 8): both}]
    assert record("outputs")["effective"]["attention"] == "math"
    done = sglang("generate", "--config", "outputs/generated_video_0.json", "--output-path", "again")
    assert done.code == 0, done.err
    assert len(timed) == 1
    assert error(latents("again"), latents("outputs")) == 0


def test_each_network_has_a_graph_of_its_own(run, recorders):
    assert run(folder="plain").code == 0
    done = run("compile.cuda_graphs=true", folder="graphs")
    assert done.code == 0, done.err
    assert [(len(recorder.shapes), recorder.replays) for recorder in recorders] == [(1, 3), (1, 1)]
    assert error(latents("graphs"), latents("plain")) <= 1e-5


def test_networks_take_turns_in_the_steps_of_a_warmup(run, recorders):
    """By the schedule the first network would compute both steps, and the second be captured while it is timed."""
    words = ("compile.cuda_graphs=true", "compile.warmup=true")
    done = run(*words, "compile.warmup_steps=2")
    assert (done.code, "warms up" in done.err) == (0, False), done.err
    assert [recorder.replays for recorder in recorders] == [3 + 1, 1 + 1]
    done = run(*words, "compile.warmup_steps=1")
    assert [recorder.replays for recorder in recorders[2:]] == [3 + 1, 1]
    assert "compile.warmup_steps=1 warms up transformer only; this model has 2 denoising networks" in done.err


def test_videos_of_other_lengths_have_other_fingerprints(run):
    found = []
    for frames in (3, 5):
        words = ("--num-frames", frames, "--perf-dump-path", "dump.json", "perf.machine_rates=false", "perf.work=false")
        assert run(*words).code == 0
        found.append(json.loads(Path("dump.json").read_text())["fingerprint"])
    assert [each["fields"]["num_frames"] for each in found] == [3, 5]
    assert found[0]["hash"] != found[1]["hash"]


def test_evaluations_of_two_networks_are_of_two_kinds():
    guidance = Guidance(3.0, steps=range(1, 4))
    assert kinds(guidance, [0, 1, 2, 3], ["high", "high", "high", "low"]) == [0, 1, 1, 3]
    assert kinds(guidance, [0, 1, 2, 3]) == [0, 1, 1, 1]


def test_a_second_network_that_fits_no_layout_or_has_unknown_settings_is_refused(run, pipelines):
    """As the first would be: all networks of a model are looked at."""
    other = video_runs.save_model(Path("other"), pipelines["sd15"])
    config = other / "transformer_2" / "config.json"
    config.write_text(json.dumps(video_runs.CONFIG | {"num_attention_heads": 3}))
    done = run("parallel.tp_size=2", path=other)
    assert (done.code, "this network has layers of 3 heads" in done.err) == (2, True), done.err
    config.write_text(json.dumps(video_runs.CONFIG | {"gated": True}))
    done = run(path=other)
    assert (done.code, "its transformer_2 does not support gated=True" in done.err) == (2, True), done.err
