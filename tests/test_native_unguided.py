"""Scales that guide nothing: from 1 down the prompt alone is evaluated, on both backends."""

import json

import pytest
from native import assert_both_make_the_same, counted_rows, record, runner

from sglang_gen.engine import cfg

NEGATIVE = ("--negative-prompt", "a dog")
SCALES = [0, 0.5, 1]


@pytest.fixture
def rows(monkeypatch):
    return counted_rows(monkeypatch)


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


def scaled(name: str, scale: float) -> tuple[str, ...]:
    """The words for a scale of classifier-free guidance, which FLUX has under another name."""
    if name == "flux":
        return "--diffusers-kwargs", json.dumps({"true_cfg_scale": scale})
    return "--guidance-scale", str(scale)


@pytest.mark.whole
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_a_scale_of_one_and_below_guides_nothing(run, rows, name, scale):
    assert_both_make_the_same(run, name, *scaled(name, scale), *NEGATIVE, steps=2)
    assert set(rows) == {1}
    assert record("sglang")["effective"]["guided_steps"] is None


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_a_scale_just_above_one_guides(run, rows, name):
    assert_both_make_the_same(run, name, *scaled(name, 1.25), *NEGATIVE, steps=2)
    assert set(rows) == {2}


@pytest.mark.parametrize("scale", SCALES)
def test_what_guidance_leaves_unused_is_warned_of_at_every_such_scale(run, scale):
    words = ("sampling.guidance_interval=[0,0.7]", "--diffusers-kwargs", '{"guidance_rescale": 0.7}')
    done = run("sdxl", *scaled("sdxl", scale), *NEGATIVE, *words, steps=2)
    assert done.code == 0, done.err
    reason = f"there is no guidance at a scale of {float(scale)}"
    assert f"WARNING: The negative prompt has no effect at a guidance scale of {float(scale)}" in done.lines
    assert f"WARNING: sampling.guidance_interval has no effect: {reason}" in done.lines
    assert f"WARNING: --diffusers-kwargs: guidance_rescale has no effect: {reason}" in done.lines


@pytest.mark.parametrize("scale", SCALES)
def test_ranks_for_branches_that_there_are_not_are_refused(run, scale):
    done = run("sd3", *scaled("sd3", scale), "parallel.num_gpus=2", "parallel.enable_cfg_parallel=true", "device=cpu")
    sentence = f"parallel.enable_cfg_parallel: without guidance (--guidance-scale {float(scale)}) there is one branch"
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


@pytest.mark.parametrize(("scale", "kinds"), [(0.5, [0, 0, 0, 0]), (1.0, [0, 0, 0, 0]), (3.0, [0, 1, 1, 0])])
def test_evaluations_are_of_one_kind_where_nothing_is_guided(scale, kinds):
    assert cfg.kinds(cfg.Guidance(scale, steps=range(1, 3)), [0, 1, 2, 3]) == kinds
