"""Settings of DeepCache: schedules, refusals before weights are read, and warnings."""

import numpy as np
import pytest
import torch
from native import runner

from sglang_gen.backends.native import engine
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.schema import Cache, CacheMethod
from sglang_gen.families import unet_shared, unet_spec
from sglang_gen.families.sd.examples import SDExamples
from sglang_gen.families.sdxl.examples import SDXLExamples
from sglang_gen.plan import deep_schedule, step_cache

DEEP = ("--backend", "sglang", "cache=deepcache")


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


def authors(total: int, count: int, center: int, power: float) -> list[int]:
    """`sample_from_quad_center` of the authors' pipeline."""
    spaced = np.linspace((-center) ** (1 / power), (total - center) ** (1 / power), count + 1)
    return [0] + [int(number) + center for number in np.unique((spaced**power).real.astype(np.int32))[1:-1]]


@pytest.mark.parametrize(("total", "interval", "center", "power"), [
    (50, 5, 15, 1.4), (50, 10, 10, 1.2), (50, 3, 15, 1.4), (250, 10, 15, 1.4), (20, 3, 10, 1.1), (50, 5, 0, 1.4),
])  # fmt: skip
def test_full_steps_around_a_center_are_those_of_the_authors(total, interval, center, power):
    cache = Cache(method=CacheMethod.deepcache, interval=interval, center=center, power=power)
    found = deep_schedule.schedule(cache, total)
    assert [step for step, full in enumerate(found) if full] == authors(total, -(-total // interval), center, power)
    deep_schedule.check_schedule(cache, 12, total)


@pytest.mark.parametrize("config", [*SDExamples.variants.values(), *SDXLExamples.variants.values()])
def test_skip_connections_are_counted_from_the_config(config):
    with torch.device("meta"):
        network = unet_shared.build(config)
    assert unet_spec.skip_connections(config) == sum(stage.pops for stage in network.stages())


REFUSED = [
    ("cache.branch=6", "cache.branch is 6; this UNet has 6 skip connections, so it must be 0 to 5"),
    ("cache.branch=-1", "cache.branch is -1; it must be at least 0"),
    ("cache.interval=0", "cache.interval is 0; it must be at least 1"),
    ("cache.power=0.5", "cache.power is 0.5; it must be at least 1"),
    ("cache.center=-2", "cache.center is -2; it must be null or at least 0"),
    ("cache.center=5", "cache.center is 5; the run evaluates the UNet 5 times, so it must be 0 to 4"),
    ("cache.steps_computation_mask=[1,0]", "has 2 entries, the run evaluates the UNet 5 times"),
    ("cache.steps_computation_mask=[1,1,1,1,1]", "computes every step, so nothing would be reused; give it a 0"),
    ("cache.steps_computation_mask=[0,1,0,0,0]", "it must be null or a list with a 1"),
    ("--num-inference-steps=1", "cache: the run has one step and no earlier one to reuse"),
    ('--cache-dit-config={"max_warmup_steps": 2}', "cache=deepcache has no settings of cache-dit; leave out"),
    ("backend=diffusers", "cache=deepcache is supported only by the native engine"),
]


@pytest.mark.parametrize(("word", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_in_a_dry_run_and_before_a_weight_is_read(
    pipelines, sglang, monkeypatch, word, sentence
):
    monkeypatch.setattr(engine, "build", lambda *_, **__: pytest.fail("weights were read"))
    dry = word != "cache.branch=6"
    steps = () if word.startswith("--num") else ("--num-inference-steps", 5)
    done = sglang("generate", "--model-path", pipelines["sdxl"], "--prompt", "a", "--seed", 7, *steps,
                  "cache=deepcache", word, f"dry_run={dry}")  # fmt: skip
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


def test_full_steps_that_round_to_one_are_refused_with_what_to_change(run):
    done = run("sdxl", *DEEP, "cache.interval=2", "cache.center=25", "dry_run=true", steps=50)
    assert (done.code, "lower it or raise cache.interval" in done.lines[-1]) == (2, True), done.err


def test_a_transformer_is_refused_by_name(run):
    done = run("sd3", *DEEP, steps=5)
    assert done.code == 2
    assert "cache=deepcache works on UNets, and StableDiffusion3Pipeline has a transformer" in done.lines[-1]


def warned(*words: str) -> list[str]:
    return step_cache.warnings(compose(Choices(("model=sdxl", "cache=deepcache", *words), {})).run, "sglang")


@pytest.mark.parametrize(
    ("words", "warnings"),
    [
        (("cache.residual_diff_threshold=0.2", "cache.calibrator=taylorseer"),
         [f"{key} has no effect with cache=deepcache" for key in ("residual_diff_threshold", "calibrator")]),
        (("cache.power=2",), ["power has no effect without center"]),
        (("cache.steps_computation_policy=static",),
         ["steps_computation_policy has no effect without steps_computation_mask"]),
        (("cache.steps_computation_mask=[1,0,0,1,0]", "cache.interval=2"),
         ["interval has no effect with steps_computation_mask, which names the steps"]),
        (("cache.steps_computation_mask=[1,0,0,1,0]", "cache.steps_computation_policy=static"), []),
        (("cache.interval=1",), ["interval=1 computes every step in full, so nothing is reused"]),
        (("cache.interval=2", "cache.branch=1", "cache.center=2", "cache.power=1.2"), []),
    ],
)  # fmt: skip
def test_settings_without_effect_are_warned_of(words, warnings):
    assert warned(*words) == [f"cache: {each}" for each in warnings]


@pytest.mark.parametrize(
    ("words", "short"),
    [(("compile=full",), True), (("compile.cuda_graphs=true",), True), (("compile=regional",), False),
     (("compile=full", "compile.warmup_steps=2"), False)],
)  # fmt: skip
def test_a_warm_up_without_a_step_that_reuses_is_warned_of(words, short):
    sentence = "compile.warmup_steps=1 warms up no step that reuses; give it 2"
    assert warned("compile.warmup=true", *words) == [sentence] * short


def test_settings_of_deepcache_are_warned_of_with_another_cache(run):
    done = run("sd3", "cache=dbcache", "cache.Fn_compute_blocks=1", "cache.max_warmup_steps=1", "cache.branch=1",
               "cache.residual_diff_threshold=0.9", "dry_run=true", steps=5)  # fmt: skip
    assert done.code == 0, done.err
    assert "WARNING: cache: branch has no effect without cache=deepcache" in done.lines
