"""DBCache on the native engine: what cache-dit does, on every layout, compiled and in graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import mostly_slow
from native import COMMON, assert_same, record, runner, tensors

DBCACHE = ("cache=dbcache", "cache.Fn_compute_blocks=1")
STATIC = (*DBCACHE, "cache.steps_computation_policy=static", "cache.steps_computation_mask=[1,1,0,0,1,0,1,0]")


@pytest.fixture
def run(pipelines, sglang):
    return runner(pipelines, sglang)


def cache_of(folder: str) -> dict:
    return json.loads(Path(folder, "perf.json").read_text())["cache"]


def decisions(folder: str) -> list[tuple]:
    return sorted((row["image"], row["branch"], row["step"], row["decision"]) for row in cache_of(folder)["trace"])


def residuals(folder: str) -> list[float]:
    rows = sorted(cache_of(folder)["trace"], key=lambda row: (row["image"], row["branch"], row["step"]))
    return [row["residual"] for row in rows if row["residual"] is not None]


# Settings whose residuals lie 1e-4 away from the threshold; each makes both decisions.
SETTINGS = {
    "plain": {"max_warmup_steps": 2, "residual_diff_threshold": 0.7},
    "no warm-up": {"max_warmup_steps": 0, "residual_diff_threshold": 0.7},
    "sparse warm-up": {"max_warmup_steps": 5, "warmup_interval": 2, "residual_diff_threshold": 0.9},
    "few reuses": {"max_warmup_steps": 1, "residual_diff_threshold": 0.95, "max_cached_steps": 3},
    "few in a row": {"max_warmup_steps": 1, "residual_diff_threshold": 0.95, "max_continuous_cached_steps": 2},
    "accumulated": {
        "max_warmup_steps": 1, "residual_diff_threshold": 0.9, "max_accumulated_residual_diff_threshold": 2.0
    },
    "last blocks": {"max_warmup_steps": 2, "residual_diff_threshold": 0.9, "Bn_compute_blocks": 1},
    "TaylorSeer": {"max_warmup_steps": 4, "residual_diff_threshold": 0.9, "calibrator": "taylorseer"},
    "TaylorSeer, second order": {
        "max_warmup_steps": 6, "residual_diff_threshold": 0.95, "calibrator": "taylorseer", "taylorseer_order": 2,
        "max_continuous_cached_steps": 2, "Bn_compute_blocks": 1,
    },
    "mask": {
        "max_warmup_steps": 8, "steps_computation_mask": [1, 1, 0, 1, 0, 0, 0, 1, 0, 0], "residual_diff_threshold": 0.7
    },
    "static mask": {"steps_computation_policy": "static", "steps_computation_mask": [1, 1, 0, 1, 0, 0, 1, 0, 0, 1]},
    "static mask, TaylorSeer": {
        "steps_computation_policy": "static", "steps_computation_mask": [1, 1, 1, 1, 1, 0, 0, 1, 0, 1],
        "calibrator": "taylorseer", "Bn_compute_blocks": 1,
    },
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("settings", mostly_slow(SETTINGS, "TaylorSeer, second order"))
def test_decisions_and_latents_are_those_of_cache_dit(run, name, settings):
    given = json.dumps({"Fn_compute_blocks": 1, **SETTINGS[settings]})
    for backend in ("sglang", "diffusers"):
        dump = ("--perf-dump-path", f"{backend}/perf.json")
        done = run(name, "--backend", backend, "--cache-dit-config", given, *dump, folder=backend, steps=10)
        assert done.code == 0, done.err
    ours, theirs = cache_of("sglang"), cache_of("diffusers")
    assert ours["steps"] == theirs["steps"]
    assert set(ours["steps"]) == {"compute", "reuse"}
    assert ours["residual_diffs"] == pytest.approx(theirs["residual_diffs"], rel=1e-4)
    threshold = SETTINGS[settings].get("residual_diff_threshold", 0.08)
    assert all(abs(change - threshold) > 1e-4 for change in ours["residual_diffs"].values())
    assert_same("sglang", "diffusers", 1)


@pytest.mark.slow
def test_branches_in_two_calls_decide_as_in_cache_dit(run):
    given = json.dumps({"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.7,
                        "enable_separate_cfg": True})  # fmt: skip
    words = ("--negative-prompt", "dark", "--diffusers-kwargs", '{"true_cfg_scale": 3.0}', "--cache-dit-config", given)
    for backend, more in (("sglang", ("sampling.guidance_batching=sequential",)), ("diffusers", ())):
        dump = ("--perf-dump-path", f"{backend}/perf.json")
        done = run("flux", "--backend", backend, *words, *dump, *more, folder=backend, steps=10)
        assert done.code == 0, done.err
    assert cache_of("sglang")["steps"] == cache_of("diffusers")["steps"]
    assert {row["branch"] for row in cache_of("sglang")["trace"]} == {"conditional", "unconditional"}
    assert_same("sglang", "diffusers", 1)


@pytest.mark.whole
@pytest.mark.parametrize("name", mostly_slow(("flux", "sd3"), "sd3"))
@pytest.mark.parametrize(
    "words", [(*DBCACHE, "cache.residual_diff_threshold=0"), ("cache=none",)], ids=["zero", "none"]
)
def test_a_threshold_of_zero_gives_the_latents_of_a_run_without_a_cache_bit_for_bit(run, name, words):
    assert run(name, folder="plain", steps=4).code == 0
    done = run(name, *words, "cache.max_warmup_steps=1", folder="cached", steps=4)
    assert done.code == 0, done.err
    assert np.array_equal(tensors("plain")["latents"], tensors("cached")["latents"])


LAYOUTS = ("parallel=tp2", "parallel=ring2", "parallel=ulysses2", "parallel=usp4", "parallel=cfg2", "parallel=sp2_tp2",
           "parallel=dp2", "parallel=cfg2_sp2")  # fmt: skip
PAIR = ("--num-samples", 2, "sampling.batch_size=1")
GUIDED = {
    "sd3": ("--guidance-scale", 3),
    "flux": ("--negative-prompt", "dark", "--diffusers-kwargs", '{"true_cfg_scale": 3.0}'),
}


@pytest.mark.whole
@pytest.mark.parametrize("cache", mostly_slow(("dynamic", "taylorseer", "static"), "dynamic"))
@pytest.mark.parametrize("name", mostly_slow(("sd3", "flux"), "sd3"))
@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "parallel=sp2_tp2"))
def test_every_layout_decides_and_computes_as_one_process(run_on_ranks, name, layout, cache):
    words = {
        "dynamic": (*DBCACHE, "cache.max_warmup_steps=2", "cache.residual_diff_threshold=0.7"),
        "taylorseer": (*DBCACHE, "cache.max_warmup_steps=4", "cache.residual_diff_threshold=0.9",
                       "cache.calibrator=taylorseer"),
        "static": STATIC,
    }[cache]  # fmt: skip
    for folder, more in (("one", ()), ("ranks", (layout,))):
        dump = ("--output-path", folder, "--perf-dump-path", f"{folder}/perf.json")
        done = run_on_ranks(name, *words, *GUIDED[name], *PAIR, *dump, *more, steps=8)
        assert done.code == 0, done.err
    assert decisions("ranks") == decisions("one")
    assert {row[-1] for row in decisions("one")} >= {"computed"}
    assert len({row[-1] for row in decisions("one")}) == 2
    assert residuals("ranks") == pytest.approx(residuals("one"), rel=1e-4)
    assert_same("ranks", "one", 2)
    for collective in _collectives("ranks"):
        assert collective["count"] == collective["predicted_count"]
        assert collective["bytes"] == collective["predicted_bytes"]


def _collectives(folder: str) -> list[dict]:
    stages = json.loads(Path(folder, "perf.json").read_text())["comm"].values()
    return [one for stage in stages for one in stage["collectives"].values()]


@pytest.mark.slow
def test_a_batch_decides_and_computes_as_its_images_alone(run):
    words = (*DBCACHE, "cache.max_warmup_steps=2", "cache.residual_diff_threshold=0.62", "--guidance-scale", 3,
             "--num-samples", 3)  # fmt: skip
    for folder, rows in (("alone", 1), ("batch", 3)):
        dump = ("--perf-dump-path", f"{folder}/perf.json")
        done = run("sd3", *words, f"sampling.batch_size={rows}", *dump, folder=folder, steps=8)
        assert done.code == 0, done.err
    assert decisions("batch") == decisions("alone")
    by_step = {step: {row[-1] for row in decisions("batch") if row[2] == step} for step in range(8)}
    assert any(len(found) == 2 for found in by_step.values()), "images of a batch differ in a step"
    assert_same("batch", "alone", 3)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("compile.warmup=true",), ("perf.repeat=2",)], ids=["", "warm-up", "repeat"])
def test_nothing_is_carried_over_from_a_warm_up_or_a_repeat(run, words):
    given = (*DBCACHE, "cache.max_warmup_steps=1", "cache.residual_diff_threshold=0.9", "--num-samples", 2,
             "sampling.batch_size=1")  # fmt: skip
    for folder, more in (("plain", ()), ("again", words)):
        dump = ("--perf-dump-path", f"{folder}/perf.json")
        done = run("sd3", *given, *dump, *more, folder=folder, steps=5)
        assert done.code == 0, done.err
        assert "differs when it is generated again" not in done.err
    assert decisions("again") == decisions("plain")
    assert np.array_equal(tensors("plain", 1)["latents"], tensors("again", 1)["latents"])


@pytest.mark.slow
def test_the_work_that_is_left_out_is_not_counted(run):
    flops = {}
    for folder, words in (("plain", ()), ("cached", STATIC)):
        done = run("sd3", *words, "--perf-dump-path", f"{folder}/perf.json", folder=folder, steps=8)
        assert done.code == 0, done.err
        flops[folder] = json.loads(Path(folder, "perf.json").read_text())["work"]["denoising"]["flops"]
    assert 0.3 < flops["cached"] / flops["plain"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_slow(("sd3", "flux"), "sd3"))
@pytest.mark.parametrize(("compiled", "words", "graphs"), [
    pytest.param(
        "compile=regional", (*DBCACHE, "cache.max_warmup_steps=2", "cache.residual_diff_threshold=0.62"), None,
        marks=pytest.mark.slow,
    ),
    ("compile=full", STATIC, 2),
])  # fmt: skip
def test_compiled_blocks_and_networks_are_cached_too(run, traced, name, compiled, words, graphs):
    given = (*words, "--num-samples", 3, "sampling.batch_size=3", "--backend", "sglang")
    for folder, more in (("plain", ()), ("compiled", (compiled,))):
        done = run(name, *given, *more, "--perf-dump-path", f"{folder}/perf.json", folder=folder, steps=8)
        assert done.code == 0, done.err
    assert decisions("compiled") == decisions("plain")
    assert graphs is None or len(traced) == graphs
    assert_same("compiled", "plain", 3)


@pytest.mark.whole
@pytest.mark.parametrize(
    "extra", [(), ("cache.calibrator=taylorseer", "cache.Bn_compute_blocks=1")], ids=["", "taylor"]
)
def test_a_fixed_plan_is_captured_into_a_graph_for_computed_and_one_for_reused_steps(run, recorders, extra):
    for folder, more in (("plain", ()), ("graphs", ("compile.cuda_graphs=true",))):
        done = run("flux", *STATIC, *extra, *more, "--backend", "sglang", folder=folder, steps=8)
        assert done.code == 0, done.err
    assert len(recorders[0].shapes) == 2
    assert recorders[0].replays == 8
    assert_same("graphs", "plain", 1)


@pytest.mark.whole
def test_a_threshold_is_refused_where_it_cannot_be_compiled(run, recorders):
    for words, named in ((("compile=full",), "compile=full"), (("compile.cuda_graphs=true",), "CUDA graphs")):
        done = run("flux", *DBCACHE, "cache.max_warmup_steps=1", *words, "dry_run=true", steps=8)
        assert done.code == 2
        assert named in done.lines[-1]
        assert "scm_slow" in done.lines[-1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cfg_compute_first", True),
        ("cfg_diff_compute_separate", False),
        ("force_refresh_step_hint", 3),
        ("force_refresh_step_policy", "repeat"),
    ],
)
def test_a_field_that_only_the_library_has_is_refused_by_name(run, key, value):
    given = json.dumps({"Fn_compute_blocks": 1, "max_warmup_steps": 1, key: value})
    done = run("flux", "--backend", "sglang", "--cache-dit-config", given, "dry_run=true", steps=8)
    assert done.code == 2
    assert f"'{key}' is not supported by the native engine" in done.lines[-1]


@pytest.mark.slow
def test_blocks_are_timed_and_named_inside_of_a_cache(run):
    done = run("sd3", *STATIC, "perf.blocks=true", "perf.trace=true", "--perf-dump-path", "perf.json", steps=8)
    assert done.code == 0, done.err
    rows = json.loads(Path("perf.json").read_text())["block_timings_ms"]
    assert [row["calls"] for row in rows] == [8, *[4] * (len(rows) - 1)]


@pytest.mark.whole
def test_the_record_says_what_was_reused(run):
    done = run("sd3", *STATIC, "--backend", "sglang", steps=8)
    assert done.code == 0, done.err
    assert record("outputs")["effective"]["cache"]["reused_steps"] == 4


@pytest.mark.slow
def test_a_job_of_a_sweep_finds_nothing_of_the_jobs_before_it(run, sglang, pipelines):
    """They share the loaded network, in other sizes, numbers of steps and caches."""
    size = {"32": ("--height", 32, "--width", 32), "48": ("--height", 48, "--width", 32)}
    common = (*DBCACHE, "cache.max_warmup_steps=1", "cache.residual_diff_threshold=0.9", "--dtype", "float32")
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a cat", *COMMON, *common,
                  "--num-inference-steps", 6, "--width", 32, "--output-path", "sweep",
                  "-m", "sampling.height=32,48,32")  # fmt: skip
    assert done.code == 0, done.err
    for job, side in enumerate(("32", "48", "32")):
        alone = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a cat", *COMMON, *common,
                       "--num-inference-steps", 6, *size[side], "--output-path", f"alone{job}")  # fmt: skip
        assert alone.code == 0, alone.err
        assert np.array_equal(tensors(f"sweep/{job}")["latents"], tensors(f"alone{job}")["latents"])
