"""The diffusers backend: a sample's seed alone decides its image, whoever draws the noise."""

import copy
import inspect
import json
import re
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from cases import mostly_slow
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from native import BETAS, assert_both_make_the_same, error, picture, runner, tensors, with_scheduler
from PIL import Image
from rank_runs import assert_same
from safetensors.torch import load_file

from sglang_gen.backends.diffusers.seeding import seeded
from sglang_gen.errors import UserError
from sglang_gen.launch import launcher

pytestmark = pytest.mark.filterwarnings(
    "ignore:Should have t[ab][<>]=t[01]:UserWarning"
)  # torchsde, of a bound in float32

SDE_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NOISY = [  # of FlowMatchHeun a draw needs s_churn, which no pipeline gives
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "stochastic_sampling": True}),
    ("sd3", "DPMSolverMultistepScheduler", {**SDE_FLOW, "algorithm_type": "sde-dpmsolver++"}),
    (
        "flux",
        "DPMSolverMultistepScheduler",
        {**SDE_FLOW, "use_dynamic_shifting": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    (
        "sd3",
        "DPMSolverSinglestepScheduler",
        {**SDE_FLOW, "algorithm_type": "sde-dpmsolver++", "lower_order_final": True},
    ),
    ("sd3", "SASolverScheduler", SDE_FLOW),
    ("sd3", "FlowMatchLCMScheduler", {"shift": 3.0}),
    ("sd15", "DPMSolverSDEScheduler", {**BETAS, "steps_offset": 1, "clip_sample": False}),
    ("sdxl", "DPMSolverSDEScheduler", BETAS),
    ("sdxl", "EulerAncestralDiscreteScheduler", BETAS),
]
HALF = ("--backend", "diffusers", "--diffusers-kwargs", '{"strength": 0.7}')
FEW = (NOISY[0], NOISY[3], NOISY[7])


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.fixture
def noisy(pipelines):
    """A copy of a tiny pipeline whose scheduler draws noise."""

    def make(name: str, scheduler: str, settings: dict) -> str:
        model = with_scheduler(pipelines[name], scheduler)
        (model / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": scheduler, **settings}))
        return str(model)

    return make


def once(run, folder: str, model: object, *words: object, unrelated: int = 0, **more) -> None:
    """A run at a scale of 3, in a process whose global generator stands at `unrelated`."""
    torch.manual_seed(unrelated)
    done = run(model, "--guidance-scale", "3", *words, folder=folder, **more)
    assert done.code == 0, done.err


def assert_bits(one: str, two: str) -> None:
    for what in ("noise", "latents"):
        assert np.array_equal(tensors(one)[what], tensors(two)[what])
    assert np.array_equal(picture(f"{one}/generated_image_0.png"), picture(f"{two}/generated_image_0.png"))


@pytest.mark.whole
@pytest.mark.parametrize(("name", "scheduler", "settings"), mostly_slow(NOISY, *FEW))
def test_the_same_command_and_its_record_give_the_same_bits(run, noisy, sglang, name, scheduler, settings):
    model = noisy(name, scheduler, settings)
    once(run, "one", model, "--backend", "diffusers", unrelated=1)
    once(run, "two", model, "--backend", "diffusers", unrelated=2)
    assert_bits("one", "two")
    torch.manual_seed(3)
    assert sglang("generate", "--config", "one/generated_image_0.json", "--output-path", "again").code == 0
    assert_bits("one", "again")


@pytest.mark.whole
@pytest.mark.parametrize(("name", "scheduler", "settings"), mostly_slow(NOISY, *FEW))
def test_a_sample_of_a_batch_is_that_of_its_seed_alone(run, noisy, sglang, name, scheduler, settings):
    model = noisy(name, scheduler, settings)
    words = ("--num-samples", "2", "--backend", "diffusers")
    once(run, "batch", model, *words, "sampling.batch_size=2", unrelated=1)
    once(run, "each", model, *words, unrelated=2)  # its second batch finds what the first has left in the scheduler
    for number in range(2):
        assert error(tensors("batch", number)["latents"], tensors("each", number)["latents"]) <= 1e-5
    assert error(tensors("batch", 0)["latents"], tensors("batch", 1)["latents"]) > 1e-3
    done = sglang("generate", "--model-path", model, "--prompt", "a cat", "--seed", "8", "--guidance-scale", "3",
                  "--num-inference-steps", "3", "--height", "32", "--width", "48", "--dtype", "float32",
                  "--backend", "diffusers", "output.latents=true", "--output-path", "alone")  # fmt: skip
    assert done.code == 0, done.err
    assert np.array_equal(tensors("each", 1)["latents"], tensors("alone")["latents"])


@pytest.mark.whole
@pytest.mark.parametrize(("name", "scheduler", "settings"), mostly_slow(NOISY, *FEW))
def test_both_backends_draw_the_same_noise_in_the_same_order(run, noisy, name, scheduler, settings):
    words = ("--num-samples", "2", "sampling.batch_size=2", "--guidance-scale", "3")
    assert_both_make_the_same(run, noisy(name, scheduler, settings), *words)


BOTH_BRANCHES = [case for case in NOISY if case[0] != "flux"]  # in one batch of the network


@pytest.mark.parametrize(("name", "scheduler", "settings"), mostly_slow(BOTH_BRANCHES, NOISY[0], NOISY[7]))
def test_two_guidance_ranks_draw_the_noise_of_one_process(run, noisy, pool, monkeypatch, name, scheduler, settings):
    monkeypatch.setattr(launcher, "open_ranks", pool.open)
    model = noisy(name, scheduler, settings)
    words = ("--num-samples", "2", "sampling.batch_size=2", "--backend", "diffusers")
    once(run, "one", model, *words)
    once(run, "two", model, *words, "parallel=cfg2", unrelated=5)
    assert_same("two", "one", 2)


@pytest.mark.whole
def test_a_setting_that_makes_the_scheduler_draw_is_seeded_too(run, pipelines):
    words = ("--diffusers-kwargs", '{"stochastic_sampling": true}', "--num-samples", "2")
    once(run, "batch", "flux", *words, "sampling.batch_size=2", unrelated=1)
    once(run, "each", "flux", *words, unrelated=2)
    once(run, "plain", "flux", "--backend", "diffusers")
    for number in range(2):
        assert error(tensors("batch", number)["latents"], tensors("each", number)["latents"]) <= 1e-5
    assert error(tensors("batch")["latents"], tensors("plain")["latents"]) > 1e-3


@pytest.mark.whole
def test_a_video_is_seeded_too(run, tmp_path):
    words = ("--num-frames", "5", "--num-samples", "2", "--diffusers-kwargs", '{"stochastic_sampling": true}')
    model = str(tiny.wan(tmp_path / "wan"))
    for folder, size, unrelated in (("batch", 2, 1), ("each", 1, 2)):
        once(run, folder, model, *words, f"sampling.batch_size={size}", size=(32, 32), unrelated=unrelated)
    for number in range(2):
        batch, each = (
            load_file(f"{folder}/generated_video_{number}.safetensors")["latents"].float().numpy()
            for folder in ("batch", "each")
        )
        assert error(batch, each) <= 1e-5


@pytest.mark.whole
def test_generations_in_one_process_are_the_same_to_the_bit(run, noisy):
    done = run(noisy(*NOISY[7]), "--backend", "diffusers", "perf.repeat=2")
    assert (done.code, "differs when it is generated again" in done.err) == (0, False), done.err


@pytest.fixture
def deaf(monkeypatch) -> str:
    """Makes the autoencoder draw an input picture's latents from the global generator; the picture."""
    draw = DiagonalGaussianDistribution.sample
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: draw(self))
    Image.new("RGB", (48, 32), (200, 30, 30)).save("red.png")
    return "red.png"


@pytest.mark.whole
def test_a_draw_of_the_pipeline_from_the_global_generator_depends_on_the_seed_alone(run, deaf):
    words = ("--image-path", deaf, *HALF)
    once(run, "one", "sdxl", *words, unrelated=1)
    once(run, "two", "sdxl", *words, unrelated=2)
    assert_bits("one", "two")


@pytest.mark.whole
def test_a_batch_whose_samples_share_the_global_generator_is_refused(run, deaf):
    words = ("--image-path", deaf, *HALF, "--num-samples", "2")
    done = run("sdxl", *words, "sampling.batch_size=2")
    sentence = "sampling.batch_size: StableDiffusionXLImg2ImgPipeline draws noise without the samples' generators"
    assert (done.code, sentence in done.lines[-1]) == (2, True)
    assert run("sdxl", *words).code == 0


def test_the_seed_of_a_noise_sampler_is_that_of_the_sample(run, noisy):
    model = noisy(*NOISY[7])
    done = run(model, "--diffusers-kwargs", '{"noise_sampler_seed": 3}')
    assert (done.code, done.lines[-1]) == (2, "ERROR: --diffusers-kwargs: 'noise_sampler_seed' is set by --seed")


@pytest.mark.whole
def test_every_scheduler_that_draws_in_a_step_takes_generators_or_a_noise_sampler():
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    kinds = [kind for kind in kinds if hasattr(kind, "step") and "deprecated" not in kind.__module__]
    assert len(kinds) > 40
    drawing = [kind for kind in kinds if re.search("randn|torch.rand|multinomial|Brownian", inspect.getsource(kind))]
    assert diffusers.DPMSolverSDEScheduler in drawing
    assert len(drawing) > 20
    for kind in drawing:
        takes = "generator" in inspect.signature(kind.step).parameters
        assert takes or "self.noise_sampler = None" in inspect.getsource(kind), kind


def stepped(scheduler, *seeds: int, copied: bool = False) -> torch.Tensor:
    """What four steps of a pipeline with this scheduler, or with its own copy of it, make of zeros `[B, 4, 8, 8]`."""
    held = SimpleNamespace(scheduler=scheduler)
    with seeded(held, [torch.Generator().manual_seed(seed) for seed in seeds], "cpu"):
        used = copy.deepcopy(scheduler) if copied else scheduler
        used.set_timesteps(4)
        latents = torch.zeros(len(seeds), 4, 8, 8)
        for timestep in used.timesteps:
            latents = used.step(0.1 * latents, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    "make",
    [
        diffusers.CosineDPMSolverMultistepScheduler,  # keeps its first noise sampler
        diffusers.DPMSolverSDEScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
    ],
)
def test_every_batch_draws_anew_from_its_own_seeds_on_copies_too(make):
    scheduler, step = make(), make.step
    first, second, both = stepped(scheduler, 1), stepped(scheduler, 2), stepped(scheduler, 1, 2)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([first, second]), both)
    assert torch.equal(stepped(scheduler, 1, 2, copied=True), both)
    assert make.step is step


def test_a_scheduler_that_steps_other_rows_than_samples_draws_for_one_sample_alone():
    scheduler = diffusers.EulerAncestralDiscreteScheduler()

    def step(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with seeded(SimpleNamespace(scheduler=scheduler), generators, "cpu"):
            scheduler.set_timesteps(4)
            frames = torch.ones(6, 4, 8, 8)
            return scheduler.step(frames, scheduler.timesteps[0], frames).prev_sample

    torch.manual_seed(1)
    one = step(3)
    torch.manual_seed(2)
    assert torch.equal(step(3), one)
    with pytest.raises(UserError, match=r"run with sampling\.batch_size=1"):
        step(3, 4)
