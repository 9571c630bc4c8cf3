"""Schedulers of diffusers under the native engine: the same latents, and noise from each sample's seed alone."""

import importlib
import json
from pathlib import Path

import diffusers
import pytest
import torch
from cases import mostly_slow, mostly_whole
from native import assert_both_make_the_same, error, runner, tensors, with_scheduler


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


COMPATIBLE = sorted(kind.__name__ for kind in diffusers.PNDMScheduler().compatibles)


def test_the_schedulers_are_those_that_stable_diffusion_can_use(pipelines):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipelines["sd15"])
    assert sorted(kind.__name__ for kind in pipeline.scheduler.compatibles) == COMPATIBLE
    assert {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"} <= set(COMPATIBLE)  # scipy and torchsde are there
    assert len(COMPATIBLE) >= 15


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:Should have ta>=t0:UserWarning")  # torchsde, of a bound in single precision
@pytest.mark.parametrize("name", mostly_slow(COMPATIBLE, *COMPATIBLE[::2]))
def test_each_sample_of_a_batch_is_what_diffusers_makes_of_its_seed_alone(pipelines, run, name):
    model = with_scheduler(pipelines["sd15"], name, steps_offset=1, clip_sample=False)
    words = ("--num-samples", "2", "sampling.batch_size=2", "--guidance-scale", "3", "--backend", "sglang")
    done = run(str(model), *words, steps=6)
    assert done.code == 0, done.err
    for number in range(2):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
        assert type(pipeline.scheduler).__name__ == name
        pipeline.set_progress_bar_config(disable=True)
        if name == "DPMSolverSDEScheduler":
            pipeline.scheduler.noise_sampler_seed = 7 + number
        generator = torch.Generator("cpu").manual_seed(7 + number)
        theirs = pipeline("a cat", height=32, width=48, num_inference_steps=6, guidance_scale=3.0, generator=generator,
                          output_type="latent").images  # fmt: skip
        assert error(tensors("outputs", number)["latents"][None], theirs.numpy()) <= 1e-5


SCHEDULERS = {
    "EulerDiscreteScheduler": [{"timestep_spacing": "trailing", "prediction_type": "v_prediction"}],
    "EulerAncestralDiscreteScheduler": [{"steps_offset": 1}],
    "DDIMScheduler": [{"clip_sample": False, "steps_offset": 1}, {"rescale_betas_zero_snr": True, "clip_sample": True}],
    "DDPMScheduler": [{"clip_sample": False}],
    "DPMSolverMultistepScheduler": [{"use_karras_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"}],
    "UniPCMultistepScheduler": [{"solver_order": 2}],
    "PNDMScheduler": [{"skip_prk_steps": True}, {"skip_prk_steps": False}],
    "LMSDiscreteScheduler": [{}],
    "HeunDiscreteScheduler": [{}, {"use_karras_sigmas": True}],
    "LCMScheduler": [{}],
    "TCDScheduler": [{}],
}


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    mostly_whole(
        mostly_slow(
            [(name, settings) for name, several in SCHEDULERS.items() for settings in several],
            *((name, several[0]) for name, several in SCHEDULERS.items()),
        ),
        *((name, SCHEDULERS[name][0]) for name in ("EulerAncestralDiscreteScheduler", "DDIMScheduler")),
    ),
)
def test_every_scheduler_of_diffusion_makes_the_same_picture(pipelines, run, scheduler, settings):
    model = with_scheduler(pipelines["sdxl"], scheduler, **settings)
    assert_both_make_the_same(run, str(model), "--num-samples", "2", "sampling.batch_size=2", steps=6)


@pytest.mark.whole
def test_a_scheduler_that_cannot_do_so_few_steps_is_refused_for_the_warmup(pipelines, run):
    model = with_scheduler(pipelines["sd15"], "PNDMScheduler", skip_prk_steps=False)
    done = run(model, "--warmup", steps=4)
    assert done.code == 2
    assert "The warm-up with compile.warmup_steps=1 is not possible: PNDMScheduler refuses 1 step" in done.lines[-1]
    assert run(model, "--warmup", "--warmup-steps", "4", steps=4).code == 0


@pytest.mark.whole
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    mostly_slow([("PNDMScheduler", 4), ("HeunDiscreteScheduler", 3)], ("PNDMScheduler", 4)),
)
def test_a_step_may_evaluate_the_network_more_than_once(pipelines, run, scheduler, steps):
    model = with_scheduler(pipelines["sdxl"], scheduler)
    for backend in ("sglang", "diffusers"):
        assert run(model, "--backend", backend, "--perf-dump-path", f"{backend}.json", steps=steps).code == 0
        assert len(json.loads(Path(f"{backend}.json").read_text())["denoise_steps_ms"]) == steps


def test_a_scheduler_that_cannot_sample_the_model_is_one_sentence(pipelines, run):
    model = with_scheduler(pipelines["sdxl"], "FlowMatchEulerDiscreteScheduler")
    done = run(model, "--backend", "sglang")
    sentence = "is not a scheduler for diffusion models, so it cannot sample from this UNet"
    assert (done.code, done.lines[-1]) == (2, f"ERROR: FlowMatchEulerDiscreteScheduler {sentence}")


def test_more_steps_than_the_scheduler_has_are_one_sentence(pipelines, run):
    done = run(with_scheduler(pipelines["sdxl"], "DDIMScheduler"), "--backend", "sglang", steps=1001)
    assert done.code == 2
    assert done.lines[-1].startswith("ERROR: DDIMScheduler refuses 1001 steps: ")


@pytest.mark.parametrize(
    ("name", "library"), [("DPMSolverSDEScheduler", "torchsde"), ("LMSDiscreteScheduler", "scipy")]
)
def test_a_scheduler_whose_library_is_missing_is_one_sentence(pipelines, run, monkeypatch, name, library):
    """As diffusers is without the library: the class is a dummy."""
    dummies = importlib.import_module(f"diffusers.utils.dummy_torch_and_{library}_objects")
    monkeypatch.setattr(diffusers, name, getattr(dummies, name))
    table = diffusers.utils.import_utils.BACKENDS_MAPPING
    monkeypatch.setitem(table, library, (lambda: False, table[library][1]))
    done = run(with_scheduler(pipelines["sd15"], name), "--backend", "sglang")
    assert done.code == 2
    assert done.lines[-1] == f"ERROR: {name} needs the package {library}: pip install {library}"
