"""Our own Euler for flow matching beside the class of diffusers: the same bits, and diffusers itself for the rest."""

import diffusers
import pytest
import torch
from native import assert_both_make_the_same, edited, runner

from sglang_gen.backends.native import components
from sglang_gen.backends.native.scheduler import build_scheduler
from sglang_gen.engine import flow_match_euler
from sglang_gen.engine.flow_match_euler import FlowMatchEuler

Theirs = diffusers.FlowMatchEulerDiscreteScheduler
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
CONFIGS = [
    {}, {"shift": 3.0}, {"shift": 1.75, "num_train_timesteps": 500, "shift_terminal": 0.1}, DYNAMIC,
    {**DYNAMIC, "time_shift_type": "linear"}, {"shift": 3.0, "stochastic_sampling": True},
]  # fmt: skip


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.mark.parametrize(
    ("config", "steps"),
    [(config, steps) for config in CONFIGS for steps in (1, 4, 28) if steps > 1 or "shift_terminal" not in config],
    ids=str,
)
@pytest.mark.parametrize("given", [True, False])
def test_times_noise_and_steps_are_those_of_diffusers_to_the_bit(config, steps, given):
    ours, theirs = FlowMatchEuler(config), Theirs(**config)
    for dtype in (torch.float32, torch.bfloat16):
        words = {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist()} if given else {"num_inference_steps": steps}
        words |= {"mu": 0.8} if config.get("use_dynamic_shifting") else {}
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**words)
            scheduler.set_begin_index(steps // 4)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)
        numbers = torch.Generator().manual_seed(0)
        sample, noise, *outputs = (torch.randn(2, 3, 4, 5, generator=numbers).to(dtype) for _ in range(steps + 2))
        first = ours.timesteps[steps // 4 :]
        ends = []
        for scheduler in (ours, theirs):
            generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
            latents = scheduler.scale_noise(sample, first[:1].repeat(2), noise)
            for timestep, output in zip(first, outputs, strict=False):
                (latents,) = scheduler.step(output, timestep, latents, generator=generators, return_dict=False)
            ends.append(latents)
        assert ends[0].dtype is dtype
        assert torch.equal(*ends)


def test_a_second_schedule_begins_anew():
    scheduler = FlowMatchEuler({})
    for _ in range(2):
        scheduler.set_timesteps(2)
        (latents,) = scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))
    assert torch.equal(latents, (scheduler.sigmas[1] - scheduler.sigmas[0]) * torch.ones(1, 2))


def test_a_dynamic_shift_needs_its_mu():
    with pytest.raises(ValueError, match="`mu` must be given"):
        FlowMatchEuler(DYNAMIC).set_timesteps(4)


def test_the_defaults_are_those_of_diffusers():
    theirs = {key: value for key, value in Theirs().config.items() if not key.startswith("_")}
    assert theirs == flow_match_euler.CONFIG_DEFAULTS


@pytest.mark.parametrize(
    ("changes", "own"),
    [({}, True), ({"_diffusers_version": "0.40.0"}, True), ({"use_karras_sigmas": True}, False),
     ({"invert_sigmas": True}, False), ({"invented_in": 2030}, False)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The config attributes")
def test_what_ours_does_not_know_is_diffusers(pipelines, run, monkeypatch, changes, own):
    made = []
    build = build_scheduler

    def noted(component):
        found = build(component)
        made.append(type(found))
        return found

    monkeypatch.setattr(components, "build_scheduler", noted)
    model = edited(pipelines["sd3"], "model", "scheduler/scheduler_config.json", **changes)
    assert_both_make_the_same(run, model)
    assert (FlowMatchEuler in made, Theirs in made) == (own, not own)
