"""Guidance of the native engine: in an interval of the steps, and with both branches at once or in turn."""

import contextlib
import inspect
import json
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from cases import mostly_slow
from native import COMMON, counted_rows, error, record, runner, tensors, with_scheduler
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_gen import env
from sglang_gen.engine import cfg, residency
from sglang_gen.engine.denoise import step_numbers
from sglang_gen.families import registry
from sglang_gen.families.contract import Request
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.models.flux import Flux
from sglang_gen.models.sd3 import SD3
from sglang_gen.models.unet import UNet
from sglang_gen.plan.guidance import guided_steps
from sglang_gen.types import Size

NETWORKS = {"sd15": UNet, "sdxl": UNet, "sd3": SD3, "flux": Flux}
TRUE_CFG = ("--diffusers-kwargs", '{"true_cfg_scale": 3.0}', "--negative-prompt", "a dog")
WORDS = {name: ("--guidance-scale", "3", *(TRUE_CFG if name == "flux" else ())) for name in NETWORKS}
SIZE = {"height": 32, "width": 48}


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.fixture
def rows(monkeypatch):
    return counted_rows(monkeypatch)


def expected(folder, guided: range, steps: int, evaluations: int = 1, **given: object) -> np.ndarray:
    """Latents of diffusers' pipeline under guidance of 3 in the guided steps, and of as good as 1 in the others."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def scale(index: int) -> float:
        return 3.0 if index // evaluations in guided else 1 + 1e-7  # at 1 the pipeline would drop a branch for good

    def set_scale(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = scale(index + 1)
        return {}

    return pipeline("a cat", guidance_scale=scale(0), num_inference_steps=steps, callback_on_step_end=set_scale,
                    generator=torch.Generator("cpu").manual_seed(7), output_type="latent", **SIZE,
                    **given).images.numpy()  # fmt: skip


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_guidance_starts_and_stops_at_a_step(pipelines, run, rows, name):
    guided = range(1, 3)
    done = run(name, *WORDS[name], "sampling.guidance_interval=[0.2,0.6]", steps=5)
    assert done.code == 0, done.err
    calls = rows[1:] if name == "sd15" else rows  # PNDM evaluates the first step twice
    assert calls == [2 if step in guided else 1 for step in range(5)]
    assert record("outputs")["effective"]["backend"] == "sglang"
    assert record("outputs")["effective"]["guided_steps"] == [guided.start, guided.stop]
    if name == "sd15":
        guided = range(guided.start + 1, guided.stop + 1)  # by evaluation
    assert error(tensors("outputs")["latents"][None], expected(pipelines[name], guided, 5)) <= 1e-5


@pytest.mark.parametrize(
    ("interval", "steps", "skipped", "guided"),
    [
        ([0.29, 0.57], 100, 0, range(29, 57)),  # 28.999999999999996 and 56.99999999999999 in floating point
        ([0.3, 0.8], 3, 0, range(1, 2)),
        ([0.1, 0.9], 4, 0, range(4)),
        ([0.16, 0.18], 3, 0, range(1)),
        ([0.35, 0.66], 10, 3, range(1, 4)),
        ([0.26, 0.34], 10, 3, range(0)),
        (None, 10, 3, range(7)),
    ],
)
def test_the_ends_of_an_interval_are_the_nearest_steps(interval, steps, skipped, guided):
    assert guided_steps(interval, steps, skipped) == guided


def test_true_guidance_of_flux_starts_and_stops_at_a_step(pipelines, run, rows):
    done = run("flux", *WORDS["flux"], "sampling.guidance_interval=[0.25,0.75]", steps=4)
    assert done.code == 0, done.err
    assert rows == [1, 2, 2, 1]
    pipeline = diffusers.FluxPipeline.from_pretrained(pipelines["flux"], dtype=torch.float32)
    outputs: list = []

    def hook(module, args, output):
        """In a step without guidance what the negative prompt predicts is what the prompt does."""
        outputs.append(output)
        step, negative = divmod(len(outputs) - 1, 2)
        return outputs[-2] if negative and step in (0, 3) else None

    pipeline.transformer.register_forward_hook(hook)
    theirs = pipeline("a cat", negative_prompt="a dog", true_cfg_scale=3.0, guidance_scale=3.0, num_inference_steps=4,
                      generator=torch.Generator("cpu").manual_seed(7), output_type="latent", **SIZE).images  # fmt: skip
    assert error(tensors("outputs")["latents"][None], theirs.numpy()) <= 1e-5


@pytest.mark.whole
@pytest.mark.parametrize(
    ("scheduler", "evaluations"), [("EulerAncestralDiscreteScheduler", 1), ("HeunDiscreteScheduler", 2)]
)
def test_an_interval_holds_whole_steps_of_any_scheduler(pipelines, run, rows, scheduler, evaluations):
    model = with_scheduler(pipelines["sdxl"], scheduler)
    rescale = ("--diffusers-kwargs", '{"guidance_rescale": 0.7}')
    words = ("--guidance-scale", "3", *rescale, "sampling.guidance_interval=[0.25,0.5]")
    done = run(str(model), *words, steps=8)
    assert done.code == 0, done.err
    assert rows == [2 if number in (2, 3) else 1 for number in step_numbers(len(rows), 8, evaluations)]
    theirs = expected(model, range(2, 4), 8, evaluations, guidance_rescale=0.7)
    assert error(tensors("outputs")["latents"][None], theirs) <= 1e-5


@pytest.mark.whole
def test_the_interval_of_all_steps_is_bit_identical_to_none(run, rows):
    for folder, words in (("none", ()), ("all", ("sampling.guidance_interval=[0,1]",))):
        assert run("sdxl", *words, folder=folder).code == 0
    assert rows == [2] * 6
    assert np.array_equal(tensors("none")["latents"], tensors("all")["latents"])


@pytest.mark.whole
def test_an_interval_is_of_the_schedule_whatever_a_picture_spares(run, rows):
    Image.new("RGB", (32, 32), (200, 90, 30)).save("fox.png")
    words = ("--image-path", "fox.png", "--diffusers-kwargs", '{"strength": 0.5}')
    assert run("sd3", *words, "sampling.guidance_interval=[0.3,0.7]", steps=10).code == 0
    assert rows == [2, 2, 1, 1, 1]
    assert record("outputs")["effective"]["guided_steps"] == [0, 2]
    assert run("sd3", *words, steps=10, folder="all").code == 0
    assert record("all")["effective"]["guided_steps"] == [0, 5]
    done = run("sd3", *words, "sampling.guidance_interval=[0.1,0.4]", steps=10)
    assert (done.code, "[0.1, 0.4] lies before the last 5 of 10 steps" in done.lines[-1]) == (2, True)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ("[0.5]", "sampling.guidance_interval is [0.5]; it must be two fractions of the steps, such as [0.2, 0.8]"),
        ("[0.6,0.4]", "is [0.6, 0.4]; it must be two fractions"),
        ("[-0.1,1]", "is [-0.1, 1.0]; it must be two fractions"),
        ("[0,20]", "is [0.0, 20.0]; it must be two fractions"),
        ("[0.4,0.45]", "sampling.guidance_interval [0.4, 0.45] contains none of the 3 steps"),
        ("wide", "sampling.guidance_interval"),
    ],
)
def test_an_interval_that_cannot_be_is_one_sentence(run, numbers, sentence):
    done = run("sdxl", f"sampling.guidance_interval={numbers}")
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


@pytest.mark.parametrize("setting", ["sampling.guidance_interval=[0,0.5]", "sampling.guidance_batching=sequential"])
def test_what_only_the_native_engine_has_is_never_dropped(run, setting):
    path = setting.partition("=")[0]
    done = run("sdxl", setting, "--backend", "diffusers")
    sentence = f"{path} is supported only by the native engine"
    assert (done.code, done.lines[-1]) == (2, f"ERROR: {sentence}; run with --backend sglang or auto")
    done = run("sdxl", setting, "--diffusers-kwargs", '{"clip_skip": 1}')
    assert (done.code, f"{sentence}, which cannot run this: 'clip_skip' of" in done.lines[-1]) == (2, True)


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("sdxl", ("--guidance-scale", "1"), "there is no guidance at a scale of 1.0"),
        ("flux", (), "there is no guidance without a negative prompt and a true_cfg_scale above 1.0"),
    ],
)
def test_settings_of_guidance_that_is_not_there_are_warned_of(run, rows, name, words, reason):
    done = run(name, *words, "sampling.guidance_interval=[0,0.7]", "sampling.guidance_batching=sequential")
    assert done.code == 0, done.err
    for path in ("guidance_interval", "guidance_batching"):
        assert f"WARNING: sampling.{path} has no effect: {reason}" in done.lines
    assert rows == [1, 1, 1]
    assert record("outputs")["effective"]["guidance_batching"] == "none"


@pytest.mark.whole
def test_the_record_of_a_picture_says_whether_it_was_guided(pipelines, sglang, rows):
    Path("prompts.jsonl").write_text('{"prompt": "a cat", "negative_prompt": "a dog"}\n{"prompt": "a fox"}\n')
    words = ("--diffusers-kwargs", '{"true_cfg_scale": 3.0}', "sampling.prompts_file=prompts.jsonl", "--height", 32)
    done = sglang("generate", "--model-path", pipelines["flux"], *COMMON, *words, "--width", 48, "--dtype", "float32",
                  "--num-inference-steps", 3, "--output-path", "outputs", "--perf-dump-path", "perf.json")  # fmt: skip
    assert done.code == 0, done.err
    assert rows[:3] == [2] * 3
    assert rows[3:6] == [1] * 3
    found = [record("outputs", number)["effective"] for number in (0, 1)]
    keys = ("guidance_batching", "guided_steps")
    assert [tuple(each[key] for key in keys) for each in found] == [
        ("batched", [0, 3]),
        ("none", None),
    ]
    assert json.loads(Path("perf.json").read_text())["effective"]["guidance_batching"] == "batched"


@pytest.mark.whole
@pytest.mark.parametrize("name", NETWORKS)
def test_branches_in_turn_are_branches_at_once(run, rows, name):
    words = (*WORDS[name], "--num-samples", "2", "sampling.batch_size=2")
    calls = {}
    for how in ("batched", "sequential"):
        assert run(name, *words, f"sampling.guidance_batching={how}", folder=how).code == 0
        assert record(how)["effective"]["guidance_batching"] == how
        calls[how], rows[:] = list(rows), []
    assert set(calls["batched"]) == {4}
    assert calls["sequential"] == [2] * 2 * len(calls["batched"])
    for number in range(2):
        assert error(tensors("sequential", number)["latents"], tensors("batched", number)["latents"]) <= 1e-5


@pytest.mark.whole
def test_an_empty_negative_prompt_is_one_whatever_stands_beside_it(pipelines, sglang, rows):
    lines = [{"prompt": "a", "negative_prompt": ""}, {"prompt": "b", "negative_prompt": "blurry"}]
    Path("prompts.txt").write_text("\n".join(map(json.dumps, lines)))
    words = ("generate", "--model-path", pipelines["flux"], "sampling.prompts_file=prompts.txt", *COMMON, *TRUE_CFG[:2],
             "--height", 32, "--width", 48, "--num-inference-steps", 3, "--dtype", "float32")  # fmt: skip
    for backend, size in (("sglang", 2), ("sglang", 1), ("diffusers", 1)):
        more = (f"sampling.batch_size={size}", "--backend", backend, "--output-path", f"{backend}{size}")
        done = sglang(*words, *more)
        assert done.code == 0, done.err
    assert rows == [4] * 3 + [2] * 6
    for number in range(2):
        for other in ("sglang1", "diffusers1"):
            assert error(tensors("sglang2", number)["latents"], tensors(other, number)["latents"]) <= 1e-5


@pytest.mark.whole
def test_branches_in_turn_take_an_interval_too(run, rows):
    words = ("sampling.guidance_interval=[0.4,1]", "--guidance-scale", "3")
    for how in ("batched", "sequential"):
        assert run("sdxl", *words, f"sampling.guidance_batching={how}", folder=how).code == 0
    assert rows == [1, 2, 2, 1, 1, 1, 1, 1]
    assert error(tensors("sequential")["latents"], tensors("batched")["latents"]) <= 1e-5


@pytest.mark.parametrize(
    ("free", "how", "released"),
    [(None, "batched", False), (10**9, "batched", False), (10**5, "sequential", True)],
)
def test_auto_takes_both_at_once_and_keeps_the_encoders_where_they_fit(run, rows, monkeypatch, free, how, released):
    monkeypatch.setattr("sglang_gen.backends.native.memory_policy.free_memory", lambda device: free)
    monkeypatch.setattr("sglang_gen.backends.native.engine.stored_bytes", lambda tensor: 0)
    done = run("sdxl", steps=2)
    assert done.code == 0, done.err
    assert record("outputs")["effective"]["guidance_batching"] == how
    assert record("outputs")["effective"]["released"] == (["text_encoder", "text_encoder_2"] if released else [])
    assert rows == ([2, 2] if how == "batched" else [1, 1, 1, 1])


def test_encoders_that_leave_make_room_for_both_branches(run, rows, monkeypatch):
    monkeypatch.setattr("sglang_gen.backends.native.memory_policy.free_memory", lambda device: 10**5)
    monkeypatch.setattr("sglang_gen.backends.native.engine.stored_bytes", lambda tensor: 10**8)
    placed: list[tuple[int, str]] = []
    for name in ("upload", "drop"):
        move = getattr(residency.Offloaded, name)

        def noted(offloaded, move=move, name=name):
            placed.append((len(rows), name))
            return move(offloaded)

        monkeypatch.setattr(residency.Offloaded, name, noted)
    done = run("sdxl", "--num-samples", "2", steps=2)
    assert done.code == 0, done.err
    assert rows == [2, 2, 2, 2]
    assert record("outputs")["effective"]["released"] == ["text_encoder", "text_encoder_2"]
    there, back = (0, "upload"), (0, "drop")
    assert placed == [back, back, there, there, back, back, *2 * [(2, "upload")], *2 * [(2, "drop")]]


class Live(TorchDispatchMode):
    """Counts the bytes that operations bring into the world and that are alive at once."""

    def __init__(self, known: list) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.now -= size


CONDITIONS = {"sd15": [(77, 768)], "sdxl": [(77, 2048), (1280,), (6,)], "sd3_medium": [(333, 4096), (2048,)],
              "flux_dev": [(512, 4096), (768,)]}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "name"), [("sd15", "sd"), ("sdxl", "sdxl"), ("sd3_medium", "sd3"), ("flux_dev", "flux")]
)
@pytest.mark.parametrize("rows", mostly_slow([1, 2], 2))
def test_the_memory_that_is_reckoned_covers_what_a_network_holds(monkeypatch, preset, name, rows):
    """Counted on meta, at the published sizes, with attention that keeps no matrix."""
    family = registry.pipeline(registry.by_name(name))
    config = json.loads((env.preset_configs(preset) / family.spec.network / "config.json").read_text())
    request = Request(Size(1024, 768), factor=8, steps=2, guidance=3.5)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"), torch.no_grad(), contextlib.ExitStack() as stack:
        network = family.build(config).to(torch.bfloat16)
        encoded = [tuple(torch.empty(rows, *shape, dtype=torch.bfloat16) for shape in CONDITIONS[preset])]
        if preset == "sdxl":
            encoded = [encoded[0][:2]]
        noise = torch.empty(rows, 16 if name in ("sd3", "flux") else 4, 128, 96, dtype=torch.bfloat16)
        latents = noise.reshape(rows, -1, 64) if name == "flux" else noise
        predict = family.prepare(NetworkSchedule.of_one(network, 2), torch.ones(2), request, encoded)
        _, conditioning = inspect.getclosurevars(predict).nonlocals["conditioned"][""]
        tensors = [leaf for leaf in tree_leaves(vars(conditioning)) if isinstance(leaf, torch.Tensor)]
        live = stack.enter_context(Live([*network.parameters(), *network.buffers(), latents, *tensors]))
        predict(latents, 0)
    reckoned = cfg.MAPS * rows * 2 * family.widest_map(config, request)
    assert live.peak < reckoned < 4 * live.peak
    assert cfg.batch_fits(live.peak, rows, 2 * family.widest_map(config, request)) is False
    assert cfg.batch_fits(reckoned, rows, 2 * family.widest_map(config, request)) is True


def test_a_rescaled_sample_is_the_same_alone_and_in_a_batch():
    """Each sample has a deviation of its own, which is brought to that of its own text."""
    spread = torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1)
    branches = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * spread

    def predicted(rows: slice) -> torch.Tensor:
        def prepare(encoded: object) -> object:
            return lambda latents, index: branches[:, rows].flatten(0, 1)

        predict = cfg.guided(prepare, [(), ()], cfg.Guidance(3.0, rescale=0.7), [0])
        return predict(branches[0, rows], 0)

    together = predicted(slice(0, 3))
    for row in range(3):
        assert torch.equal(together[row : row + 1], predicted(slice(row, row + 1)))
    text, plain = branches[1], branches[0] + 3 * (branches[1] - branches[0])
    ratio = (text.flatten(1).std(1) / plain.flatten(1).std(1)).view(3, 1, 1)
    assert torch.allclose(together, plain * (0.7 * ratio + 0.3))


def test_a_batch_that_fills_the_free_memory_to_the_byte_fits():
    needed = cfg.MAPS * 2 * 1000
    assert cfg.batch_fits(needed, 2, 1000)
    assert not cfg.batch_fits(needed - 1, 2, 1000)
    assert cfg.batch_fits(None, 10**9, 10**9)


@pytest.mark.parametrize(
    ("interval", "steps", "skipped", "guided"),
    [
        (None, 5, 0, range(5)),
        ([0.25, 0.6], 7, 0, range(2, 4)),  # of 1.75 and 4.2
        ([0.2, 0.8], 28, 0, range(6, 22)),
        ([0.0, 0.29], 100, 0, range(29)),  # 0.29 * 100 is a little less
        ([0.2, 0.8], 28, 10, range(12)),
        ([0.2, 0.8], 28, 25, range(0)),
    ],
)
def test_the_ends_of_an_interval_are_the_nearest_steps_that_run(interval, steps, skipped, guided):
    assert guided_steps(interval, steps, skipped) == guided
