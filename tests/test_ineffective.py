"""--diffusers-kwargs that cannot take effect are warned of by name, in a dry run too."""

import json
from pathlib import Path

import diffusers
import pytest
from native import with_scheduler

from sglang_gen.backends.diffusers.scheduler_settings import Trial

UNGUIDED = "there is no guidance without a negative prompt and a true_cfg_scale above 1.0"
EULER = {"beta_schedule": "scaled_linear", "steps_offset": 1}
FLOW = {"shift": 3.0}


@pytest.fixture
def warned(pipelines, sglang):
    """Warnings of a run that is not carried out, without what they begin with."""

    def plan(name: object, kwargs: dict, *words: object) -> list[str]:
        done = sglang("generate", "--model-path", pipelines.get(name, name), "--prompt", "a cat", "--height", "32",
                      "--width", "32", "--num-inference-steps", "4", "dry_run=true", "--diffusers-kwargs",
                      json.dumps(kwargs), *words)  # fmt: skip
        assert done.code == 0, done.err
        start = "WARNING: --diffusers-kwargs: "
        return [line.removeprefix(start) for line in done.lines if line.startswith(start)]

    return plan


@pytest.mark.parametrize(
    ("name", "kwargs", "words", "expected"),
    [
        ("flux", {"shift": 9}, (), ["shift has no effect: use_dynamic_shifting is true"]),
        ("flux", {"shift": 9, "use_dynamic_shifting": False}, (), []),
        ("flux", {"max_shift": 2.0}, (), []),
        ("sd3", {"shift": 9}, (), []),
        ("sd3", {"max_shift": 2.0}, (), ["max_shift has no effect: use_dynamic_shifting is false"]),
        ("sd3", {"mu": 1.0}, (), ["mu has no effect: use_dynamic_shifting is false"]),
        ("sdxl", {"sigma_max": 9.0}, (), ["sigma_max has no effect: use_karras_sigmas is false"]),
        ("sdxl", {"sigma_max": 9.0, "use_karras_sigmas": True}, (), []),
        ("sdxl", {"guidance_rescale": 0.5, "timestep_spacing": "trailing"}, (), []),
        ("sdxl", {"timestep_spacing": "leading"}, (), []),  # as it is
        ("sdxl", {"guidance_rescale": 0.5, "timestep_spacing": "trailing"}, ("--guidance-scale", "1"),
         ["guidance_rescale has no effect: there is no guidance at a scale of 1.0"]),
        ("sdxl", {"negative_target_size": [32, 32]}, (),
         ["negative_target_size has no effect: it needs negative_original_size"]),
        ("sdxl", {"negative_prompt_2": "dull"}, (),
         ["negative_prompt_2 has no effect: without a negative prompt the embeddings are zeros "
          "(force_zeros_for_empty_prompt)"]),
        ("sdxl", {"negative_prompt_2": "dull"}, ("--negative-prompt", "a dog"), []),
        ("flux", {"negative_prompt_2": "dull"}, (), [f"negative_prompt_2 has no effect: {UNGUIDED}"]),
        ("sd3", {"skip_layer_guidance_scale": 2.0}, (),
         ["skip_layer_guidance_scale has no effect: it needs skip_guidance_layers"]),
        ("sd3", {"skip_guidance_layers": [0]}, ("--guidance-scale", "1"),
         ["skip_guidance_layers has no effect: there is no guidance at a scale of 1.0"]),
        ("sdxl", {"clip_skip": 1}, (), []),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_a_warning_in_a_dry_run(warned, name, kwargs, words, expected):
    assert warned(name, kwargs, "--backend", "diffusers", *words) == expected


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_both_backends_say_the_same_of_guidance_that_is_not_there(warned, backend):
    words = ("--backend", backend)
    assert warned("flux", {"true_cfg_scale": 4.0}, *words) == [f"true_cfg_scale has no effect: {UNGUIDED}"]
    assert warned("flux", {"true_cfg_scale": 4.0}, "--negative-prompt", "a dog", *words) == []
    rescale = ["guidance_rescale has no effect: there is no guidance at a scale of 1.0"]
    assert warned("sdxl", {"guidance_rescale": 0.5}, "--guidance-scale", "1", *words) == rescale
    assert warned("sdxl", {"guidance_rescale": 0.0}, "--guidance-scale", "1", *words) == []


def test_a_run_says_it_too_and_once(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["flux"], "--prompt", "a cat", "--height", "32", "--width", "32",
                  "--num-inference-steps", "1", "--diffusers-kwargs", '{"shift": 9}')  # fmt: skip
    assert done.code == 0, done.err
    assert [line for line in done.lines if "no effect" in line] == [
        "WARNING: --diffusers-kwargs: shift has no effect: use_dynamic_shifting is true"
    ]


def test_noise_levels_that_the_scheduler_replaces_are_warned_of(pipelines, warned):
    model = with_scheduler(pipelines["flux"], "DPMSolverMultistepScheduler", use_flow_sigmas=True,
                           use_dynamic_shifting=True, prediction_type="flow_prediction")  # fmt: skip
    levels = {"sigmas": [1.0, 0.7, 0.5, 0.2]}
    assert warned(model, levels, "--backend", "diffusers") == ["sigmas has no effect: use_flow_sigmas is true"]
    assert warned("flux", levels, "--backend", "diffusers") == []


def test_an_argument_that_the_pipelines_call_does_not_read_is_warned_of(warned, monkeypatch):
    call = diffusers.StableDiffusionPipeline.__call__

    def deaf(self, prompt=None, height=None, width=None, num_inference_steps=50, guidance_scale=7.5,
             negative_prompt=None, generator=None, output_type="pil", callback_on_step_end=None,
             guidance_rescale=0.0):  # fmt: skip
        return call(self, prompt, height, width, num_inference_steps, guidance_scale=guidance_scale,
                    negative_prompt=negative_prompt, generator=generator, output_type=output_type,
                    callback_on_step_end=callback_on_step_end)  # fmt: skip

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", deaf)
    words = ("--backend", "diffusers")
    expected = ["guidance_rescale has no effect: StableDiffusionPipeline ignores it"]
    assert warned("sd15", {"guidance_rescale": 0.7}, *words) == expected


def test_a_strength_without_an_image_is_refused(pipelines, sglang):
    common = ("generate", "--prompt", "a", "--diffusers-kwargs", '{"strength": 0.5}', "dry_run=true", "--model-path")
    for name in ("sdxl", "flux"):
        done = sglang(*common, pipelines[name])
        assert (done.code, "takes 'strength'" in done.lines[-1]) == (2, True)
    done = sglang(*common, pipelines["sdxl"], "model.pipeline_class_name=StableDiffusionXLImg2ImgPipeline")
    assert (done.code, "needs an input image: --image-path FILE" in done.lines[-1]) == (2, True)


def test_a_setting_that_the_scheduler_refuses_is_refused_in_a_dry_run(pipelines, sglang):
    done = sglang("generate", "--prompt", "a", "--model-path", pipelines["sdxl"], "dry_run=true",
                  "--diffusers-kwargs", '{"use_karras_sigmas": true, "use_beta_sigmas": true}')  # fmt: skip
    assert (done.code, "--diffusers-kwargs: EulerDiscreteScheduler refuses" in done.lines[-1]) == (2, True)
    assert not Path("outputs").exists()


SETTINGS = [
    ("FlowMatchEulerDiscreteScheduler", FLOW, {"shift_terminal": 0.1, "use_karras_sigmas": True}, {}),
    ("FlowMatchEulerDiscreteScheduler", FLOW, {"time_shift_type": "linear"}, {"use_dynamic_shifting is false"}),
    ("EulerDiscreteScheduler", {**EULER, "trained_betas": [0.001 * n for n in range(1, 101)],
                                "num_train_timesteps": 100}, {"beta_start": 0.1}, {"trained_betas are given"}),
    ("EulerDiscreteScheduler", {**EULER, "timestep_spacing": "trailing"}, {"steps_offset": 0},
     {"nothing depends on it beside the other settings of EulerDiscreteScheduler"}),
    ("DPMSolverMultistepScheduler", EULER, {"sample_max_value": 2.0}, {"thresholding is false"}),
    ("DPMSolverMultistepScheduler", EULER, {"thresholding": True, "sample_max_value": 2.0,
                                            "dynamic_thresholding_ratio": 0.7}, {}),
    ("DPMSolverMultistepScheduler", EULER, {"flow_shift": 2.0}, {"use_flow_sigmas is false"}),
    ("DPMSolverMultistepScheduler", EULER, {"variance_type": "learned"}, {}),  # cannot be run without its network
    ("DDIMScheduler", EULER, {"clip_sample_range": 2.0}, {}),
    ("DDIMScheduler", {**EULER, "clip_sample": False}, {"clip_sample_range": 2.0}, {"clip_sample is false"}),
    ("PNDMScheduler", EULER, {"skip_prk_steps": True, "set_alpha_to_one": True}, {}),
    ("UniPCMultistepScheduler", EULER, {"solver_type": "bh1", "predict_x0": False}, {}),
    ("LCMScheduler", EULER, {"original_inference_steps": 60, "timestep_scaling": 5.0}, {}),
    ("EulerAncestralDiscreteScheduler", EULER, {"prediction_type": "v_prediction"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "given", "reasons"), SETTINGS)
def test_a_setting_is_idle_where_no_step_depends_on_it(name, config, given, reasons):
    assert set(Trial(getattr(diffusers, name), config, 4, shifts=True).idle(given).values()) == set(reasons)


def test_a_setting_that_acts_in_more_steps_alone_is_idle():
    trial = Trial(diffusers.FlowMatchEulerDiscreteScheduler, FLOW, 1, shifts=True)
    assert trial.idle({"shift": 9}) == {"shift": "nothing depends on it in so few steps"}


def test_settings_of_a_dynamic_shift_are_idle_where_the_pipeline_computes_its_own():
    trial = (diffusers.FlowMatchEulerDiscreteScheduler, {**FLOW, "use_dynamic_shifting": True}, 4)
    assert Trial(*trial, shifts=True).idle({"base_shift": 0.9}) == {}
    assert list(Trial(*trial, shifts=False).idle({"base_shift": 0.9})) == ["base_shift"]
