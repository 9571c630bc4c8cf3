"""DeepCache: steps of a UNet that reuse its deep feature map."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import mostly_whole
from deep_unet import by_hand, by_helper
from native import error, runner, tensors, with_scheduler

DEEP = ("--backend", "sglang", "cache=deepcache")
GUIDED = ("--guidance-scale", "3")


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


@pytest.fixture
def latents(run):
    """Latents `[1, C, h, w]` of a run with DeepCache."""

    def generate(name, *words, folder="deep", number=0, **given) -> np.ndarray:
        done = run(name, *DEEP, *words, folder=folder, **given)
        assert done.code == 0, done.err
        return tensors(folder, number)["latents"][None]

    return generate


def dump() -> dict:
    return json.loads(Path("perf.json").read_text())


UNIFORM = [("sd15", 2, 0), ("sd15", 3, 1), ("sd15", 2, 2), ("sdxl", 2, 0), ("sdxl", 3, 2), ("sdxl", 2, 4)]


@pytest.mark.parametrize(("name", "interval", "branch"), mostly_whole(UNIFORM, ("sd15", 2, 0)))
def test_evenly_spaced_full_steps_give_the_latents_of_the_authors_helper(pipelines, latents, name, interval, branch):
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper
    folder = with_scheduler(pipelines[name], "EulerDiscreteScheduler", steps_offset=1)
    words = (f"cache.interval={interval}", f"cache.branch={branch}", *GUIDED)
    ours = latents(folder, *words, steps=5)
    assert error(ours, by_helper(helper, folder, branch, interval, 5)) <= 1e-5
    assert error(ours, latents(folder, "cache.interval=1", *GUIDED, folder="whole", steps=5)) > 1e-3


SCHEDULES = {
    "cache.interval=3": {0, 3, 6},
    "cache.center=3": {0, 3, 4},
    "cache.steps_computation_mask=[1,1,0,0,0,1,0]": {0, 1, 5},
}
BRANCHES = [("sd15", 0), ("sd15", 3), ("sdxl", 1), ("sdxl", 3), ("sdxl", 5)]


@pytest.mark.parametrize("word", SCHEDULES)
@pytest.mark.parametrize(("name", "branch"), mostly_whole(BRANCHES, ("sd15", 3)))
def test_any_schedule_gives_the_latents_of_a_loop_written_by_hand(pipelines, latents, name, branch, word):
    folder = with_scheduler(pipelines[name], "EulerDiscreteScheduler", steps_offset=1)
    ours = latents(folder, word, f"cache.branch={branch}", *GUIDED, steps=7)
    assert error(ours, by_hand(folder, branch, SCHEDULES[word], 7)) <= 1e-5
