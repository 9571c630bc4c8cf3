"""Step caches: settings that cannot be, or under which nothing is reused, and runs in which nothing was."""

import json
import re
from pathlib import Path

import diffusers
import pytest
import tiny
from PIL import Image
from torch import nn

from sglang_gen.backends.diffusers import cache as options
from sglang_gen.backends.diffusers import engine as diffusers_engine
from sglang_gen.backends.native import engine as native_engine
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.schema import Cache, CacheMethod
from sglang_gen.errors import UserError
from sglang_gen.perf import cache_trace
from sglang_gen.plan import checks, step_cache

SIZE = ("--height", 32, "--width", 32, "--seed", 7, "--dtype", "float32")
SMALL = {"Fn_compute_blocks": 1, "max_warmup_steps": 2}
WHOLE = "a whole number of at least"
LIMIT = "a whole number of at least 1, or -1 for no limit"
MASK = "null or a list with a 1 for each step that is computed, the first among them, and a 0 for each that may reuse"


def refused(*words: str, **given: object) -> str:
    found = compose(Choices(("model=flux_dev", *words), {"sampling.prompt": "x", **given}))
    with pytest.raises(UserError) as error:
        checks.check_request(found)
    return str(error.value)


WRONG = [
    ("Fn_compute_blocks", (0, -1, 1.5, True, "8", None, [1]), f"{WHOLE} 1"),
    ("Bn_compute_blocks", (-1, 0.0, False, "0"), f"{WHOLE} 0"),
    ("residual_diff_threshold", (-0.1, "0.1", True, None, [0.1]), "a number of at least 0"),
    ("max_accumulated_residual_diff_threshold", (0, -1, "1", True), "null or a number above 0"),
    ("cfg_compute_first", (0, "false", None), "true or false"),
    ("force_refresh_step_hint", (0, 1.5, "3"), "null or a whole number of at least 1"),
    ("force_refresh_step_policy", ("twice", None), "once or repeat"),
    ("max_warmup_steps", (-1, 2.0, "2", None), f"{WHOLE} 0"),
    ("warmup_interval", (0, -1, True), f"{WHOLE} 1"),
    ("max_cached_steps", (0, -2, 1.0, "1"), LIMIT),
    ("max_continuous_cached_steps", (0, -2, None), LIMIT),
    ("enable_separate_cfg", (1, "true", []), "true, false or null"),
    ("steps_computation_mask", ([1, 2], [1, -1], [1, 0.0], [True, False], "10", [], [0, 1], 1, {}), MASK),
    ("steps_computation_policy", ("Static", "", None, 1), "dynamic or static"),
    ("calibrator", ("taylor", True, 1), "taylorseer or null"),
    ("taylorseer_order", (0, -1, 1.0, True, "1"), f"{WHOLE} 1"),
    ("enable_taylorseer", ("yes", 1, None), "true or false"),
    ("enable_calibrator", (0, "false"), "true or false"),
]


@pytest.mark.whole
@pytest.mark.parametrize(("key", "values", "legal"), WRONG, ids=[key for key, _, _ in WRONG])
def test_a_value_of_another_kind_or_range_is_refused_with_its_key_and_what_is_legal(key, values, legal):
    for value in values:
        said = refused(**{"cache.cache_dit_config": {key: value}})
        assert said.startswith(f"--cache-dit-config: '{key}' is {value!r}; it must be {legal}"), said
        nested = refused(**{"cache.cache_dit_config": {"cache_config": {key: value}}})
        assert nested == said


def test_every_key_of_the_group_has_a_rule():
    keys = {*vars(Cache()), *step_cache.SWITCHES, *step_cache.LIBRARY_FIELDS}
    assert set(step_cache.RULES) == keys - set(step_cache.FIELDS_OUTSIDE)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("cache.Fn_compute_blocks=-1", f"cache.Fn_compute_blocks is -1; it must be {WHOLE} 1"),
        ("cache.Bn_compute_blocks=-1", f"cache.Bn_compute_blocks is -1; it must be {WHOLE} 0"),
        (
            "cache.residual_diff_threshold=-1",
            "cache.residual_diff_threshold is -1.0; it must be a number of at",
        ),
        ("cache.residual_diff_threshold=nan", "cache.residual_diff_threshold is nan; it must be a finite number"),
        ("cache.max_warmup_steps=-3", f"cache.max_warmup_steps is -3; it must be {WHOLE} 0"),
        ("cache.max_cached_steps=0", f"cache.max_cached_steps is 0; it must be {LIMIT}"),
        ("cache.max_continuous_cached_steps=0", f"cache.max_continuous_cached_steps is 0; it must be {LIMIT}"),
        ("cache.steps_computation_policy=fast", "cache.steps_computation_policy is 'fast'; it must be dynamic or st"),
        ("cache.steps_computation_mask=[1,2]", f"cache.steps_computation_mask is [1, 2]; it must be {MASK}"),
        ("cache.taylorseer_order=0", f"cache.taylorseer_order is 0; it must be {WHOLE} 1"),
        ("cache.calibrator=foca", "cache.calibrator is 'foca'; it must be taylorseer or null"),
        ("cache.steps_computation_policy=static", "which reuses the steps that a mask names; give steps_computation_"),
    ],
)
def test_a_key_of_the_group_is_checked_like_one_of_the_file(word, sentence):
    assert sentence in refused("cache=dbcache", word)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("residual_diff_threshold: .nan", "cache.yaml: residual_diff_threshold is nan; it must be a finite number"),
        ("cache_config: 3", "'cache_config' is 3; it must be a mapping"),
        ("cache_config: [1]", "'cache_config' is [1]; it must be a mapping"),
        ("1: 2", "unknown key '1'"),
        ("max_warmup_steps: 1\ncache_config: {max_warmup_steps: 2}", "'max_warmup_steps' is given twice"),
        ("enable_taylorseer: true\ncalibrator: null", "enable_taylorseer and calibrator contradict each other"),
        ("enable_taylorseer: false\ncalibrator: taylorseer", "enable_taylorseer and calibrator contradict each other"),
        ("enable_taylorseer: true\nenable_calibrator: false", "enable_taylorseer and enable_calibrator contradict"),
    ],
)
def test_a_file_that_means_nothing_is_refused(sglang, text, sentence):
    Path("cache.yaml").write_text(text)
    done = sglang("generate", "--prompt", "a", "--cache-dit-config", "cache.yaml")
    assert (done.code, sentence in done.err) == (2, True), done.err


def test_a_switch_that_is_off_takes_the_calibrator_of_the_option_away():
    on = Cache(method=CacheMethod.dbcache, calibrator="taylorseer")
    assert step_cache.settings(on)["calibrator"] == "taylorseer"
    on.cache_dit_config = {"enable_taylorseer": False}
    assert step_cache.settings(on)["calibrator"] is None
    assert step_cache.settings(Cache(cache_dit_config={"enable_calibrator": True}))["calibrator"] == "taylorseer"


@pytest.fixture
def no_weights(monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(diffusers_engine, "_read", read)
    monkeypatch.setattr(native_engine, "build", read)


def asked(pipelines, name: str, settings: dict, steps: int, *words: object) -> list[object]:
    return ["generate", "--model-path", pipelines[name], "--prompt", "a cat", *SIZE, "--num-inference-steps", steps,
            "--cache-dit-config", json.dumps(settings), *words]  # fmt: skip


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("settings", "steps", "sentence"),
    [
        ({"max_warmup_steps": 8}, 8, "the warm-up (max_warmup_steps=8) covers all 8 steps, so nothing would be reused"),
        ({}, 1, "the run has one step and no earlier one to reuse"),
        ({"steps_computation_mask": [1] * 4}, 4, "steps_computation_mask computes every step, so nothing would be"),
        ({"steps_computation_mask": [1] * 4, "steps_computation_policy": "static"}, 4, "computes every step"),
        ({"steps_computation_mask": [1, 0, 1]}, 4, "steps_computation_mask has 3 entries, the run has 4 steps"),
        ({"steps_computation_mask": [1, 0, 1, 0, 1]}, 4, "steps_computation_mask has 5 entries, the run has 4 steps"),
        ({"enable_taylorseer": True, "taylorseer_order": 4}, 4, "taylorseer_order is 4; with 4 steps it must be 1 to"),
        ({"Fn_compute_blocks": 3}, 4, "Fn_compute_blocks + Bn_compute_blocks = 3 covers all 3 blocks"),
        ({"Fn_compute_blocks": 2, "Bn_compute_blocks": 9}, 4, "Bn_compute_blocks = 11 covers all 3 blocks"),
    ],
)
def test_a_cache_that_can_reuse_nothing_is_refused_before_a_weight_is_read(
    sglang, pipelines, no_weights, settings, steps, sentence, dry
):
    done = sglang(*asked(pipelines, "sd3", {**SMALL, **settings}, steps, *(["dry_run=true"] if dry else [])))
    assert (done.code, sentence in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_warmup_steps": 7}, 8),
        ({"max_warmup_steps": 8, "warmup_interval": 2}, 8),
        ({"max_warmup_steps": 0}, 2),
        ({"max_warmup_steps": 8, "steps_computation_mask": [1, 0, 1, 0]}, 4),
        ({"enable_taylorseer": True, "taylorseer_order": 3}, 4),
        ({"Fn_compute_blocks": 1, "Bn_compute_blocks": 1}, 4),
    ],
)
def test_a_cache_that_can_reuse_a_step_is_taken(sglang, pipelines, settings, steps):
    done = sglang(*asked(pipelines, "sd3", {**SMALL, **settings}, steps, "dry_run=true"))
    assert done.code == 0, done.err


SPARED = [(8, 0.25, 2), (8, 0.375, 0), (10, 0.25, 0), (8, 1.0, 0)]  # of 10 steps a quarter is two or three


@pytest.mark.parametrize(
    ("backend_name", "steps", "strength", "code"),
    [*(("sglang", *case) for case in SPARED), *(("diffusers", *case) for case in (*SPARED, (8, 1e308, 0)))],
)
def test_steps_that_an_input_picture_spares_do_not_count(sglang, pipelines, backend_name, steps, strength, code):
    Image.new("RGB", (32, 32)).save("picture.png")
    kwargs = ("--image-path", "picture.png", "--diffusers-kwargs", json.dumps({"strength": strength}))
    done = sglang(*asked(pipelines, "sd3", SMALL, steps, *kwargs, "dry_run=true", "--backend", backend_name))
    assert (done.code, "covers all 2 steps" in done.err) == (code, code == 2), done.err


@pytest.mark.whole
@pytest.mark.parametrize("backend_name", ["sglang", "diffusers"])
def test_a_scheduler_of_second_order_calls_the_network_twice_in_a_step(sglang, tmp_path, backend_name):
    folder = tiny.sd3(tmp_path / "heun")
    for path in (folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"):
        path.write_text(path.read_text().replace("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"))
    where = {"sd3": folder}
    for length, code in ((4, 2), (7, 0)):
        settings = {"Fn_compute_blocks": 1, "steps_computation_mask": [1] + [0] * (length - 1)}
        done = sglang(*asked(where, "sd3", settings, 4, "--backend", backend_name, "dry_run=true"))
        assert (done.code, "has 4 entries, the run has 7 steps" in done.err) == (code, code == 2), done.err


def test_a_pipeline_that_the_library_does_not_know_is_refused_in_the_plan(sglang, pipelines, no_weights, monkeypatch):
    import cache_dit

    monkeypatch.setattr(cache_dit.BlockAdapterRegister, "is_supported", lambda _: False)
    done = sglang(*asked(pipelines, "sd3", SMALL, 4, "dry_run=true", "--backend", "diffusers"))
    assert (done.code, done.lines[-1]) == (
        2, "ERROR: cache: cache-dit cannot cache StableDiffusion3Pipeline; run with cache=none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("computed", "sentence"),
    [(1, None), (2, None), (3, "= 3 is more than the 2 blocks of one of"), (4, "= 4 covers all 4 blocks")],
)
def test_lists_of_blocks_are_cached_each_for_itself(monkeypatch, computed, sentence):
    """More blocks than a list has would be computed twice, or fail while the network runs."""

    class Adapter:
        blocks = [nn.ModuleList(nn.Identity() for _ in range(count)) for count in (2, 4)]  # noqa: RUF012

    import cache_dit

    monkeypatch.setattr(cache_dit.BlockAdapterRegister, "get_adapter", lambda *_, **__: Adapter)
    enabled = []
    monkeypatch.setattr(cache_dit, "enable_cache", lambda *_, **__: enabled.append(True))
    settings = Cache(method=CacheMethod.dbcache, Fn_compute_blocks=1, Bn_compute_blocks=computed - 1)
    if sentence is None:
        options.StepCache(object(), settings)
    else:
        with pytest.raises(UserError, match=rf"^cache: Fn_compute_blocks \+ Bn_compute_blocks {re.escape(sentence)}"):
            options.StepCache(object(), settings)
    assert enabled == ([] if sentence else [True])


def test_the_blocks_that_are_counted_are_those_of_the_pipeline(pipelines):
    pipeline = diffusers.FluxPipeline.from_pretrained(pipelines["flux"])
    assert options._lists(pipeline) == [4]  # two double and two single blocks, which the library joins


def record(number: int = 0) -> dict:
    return json.loads(Path(f"outputs/generated_image_{number}.json").read_text())


@pytest.mark.whole
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_run_that_reused_nothing_says_so(sglang, pipelines, name):
    settings = {**SMALL, "residual_diff_threshold": 1e-9}
    done = sglang(*asked(pipelines, name, settings, 4, "--num-samples", 2, "sampling.batch_size=1",
                         "compile.warmup=true", "perf.repeat=2", "--perf-dump-path", "perf.json"))  # fmt: skip
    assert done.code == 0, done.err
    (warning,) = [line for line in done.lines if line.startswith("WARNING: ")]
    assert warning.startswith("WARNING: cache: no step was reused, so the cache saved nothing; the residual chang")
    assert warning.endswith(", and residual_diff_threshold is 1e-09")
    assert [record(number)["effective"]["cache"]["reused_steps"] for number in range(2)] == [0, 0]
    dump = json.loads(Path("perf.json").read_text())
    assert (dump["cache"]["reused"], dump["effective"]["cache"]["reused_steps"]) == (0, 0)


def test_runs_with_the_same_settings_compare_whatever_they_reused(sglang, pipelines, monkeypatch):
    fingerprints = []
    for reused in (0, 5):
        monkeypatch.setattr(cache_trace, "reused_steps", lambda _, reused=reused: reused)
        done = sglang(*asked(pipelines, "sd3", SMALL, 4, "--perf-dump-path", f"{reused}.json", "perf=light"))
        assert done.code == 0, done.err
        dump = json.loads(Path(f"{reused}.json").read_text())
        assert dump["effective"]["cache"]["reused_steps"] == reused
        fingerprints.append(dump["fingerprint"])
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0]["fields"]["cache"]["max_warmup_steps"] == 2


@pytest.mark.whole
@pytest.mark.parametrize(("backend_name", "name"), [("sglang", "sd3"), ("diffusers", "flux")])
def test_the_record_says_how_many_steps_were_reused(sglang, pipelines, backend_name, name):
    settings = {**SMALL, "residual_diff_threshold": 10.0, "max_cached_steps": 3}
    done = sglang(*asked(pipelines, name, settings, 8, "--backend", backend_name))
    assert done.code == 0, done.err
    assert not [line for line in done.lines if line.startswith("WARNING: ")]
    assert record()["effective"]["cache"]["reused_steps"] == 3


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({"taylorseer_order": 2}, ["taylorseer_order has no effect without calibrator=taylorseer"]),
        (
            {"steps_computation_mask": [1, 0, 1, 0], "steps_computation_policy": "static", "max_cached_steps": 1,
             "max_continuous_cached_steps": 1, "residual_diff_threshold": 0.2},
            [f"{name} has no effect with steps_computation_policy=static, which reuses every step that the mask marks "
             "with 0" for name in ("residual_diff_threshold", "max_cached_steps", "max_continuous_cached_steps")],
        ),
        (
            {"steps_computation_mask": [1, 0, 1, 0], "steps_computation_policy": "static", "enable_separate_cfg": True},
            ["enable_separate_cfg has no effect with steps_computation_policy=static, which decides alike for all "
             "branches"],
        ),
        ({"residual_diff_threshold": 0}, ["residual_diff_threshold=0 reuses no step, so the cache saves nothing"]),
        ({"max_cached_steps": 1, "enable_taylorseer": True, "taylorseer_order": 2}, []),
    ],
)  # fmt: skip
def test_settings_that_act_only_with_another_are_warned_of(sglang, pipelines, settings, warnings):
    done = sglang(*asked(pipelines, "sd3", {**SMALL, **settings}, 4, "dry_run=true"))
    assert done.code == 0, done.err
    assert [line for line in done.lines if line.startswith("WARNING: cache: ")] == [
        f"WARNING: cache: {each}" for each in warnings
    ]


@pytest.mark.parametrize(("backend_name", "backend"), [("diffusers", diffusers_engine), ("sglang", native_engine)])
def test_the_engine_says_the_same_before_and_after_a_generation(sglang, pipelines, monkeypatch, backend_name, backend):
    """The reused steps are those of a batch, and the dump has those of the last one."""
    kind = {"diffusers": "DiffusersEngine", "sglang": "NativeEngine"}[backend_name]
    seen, close, load = [], getattr(backend, kind).close, backend.load

    def loaded(*args):
        engine = load(*args)
        seen.append(engine.effective())
        return engine

    def closed(engine):
        seen.append(engine.effective())
        close(engine)

    monkeypatch.setattr(backend, "load", loaded)
    monkeypatch.setattr(getattr(backend, kind), "close", closed)
    settings = {**SMALL, "residual_diff_threshold": 10.0, "max_cached_steps": 1}
    words = ("--perf-dump-path", "perf.json", "perf=light", "--backend", backend_name)
    done = sglang(*asked(pipelines, "sd3", settings, 4, *words))
    assert done.code == 0, done.err
    assert seen[0] == seen[1]
    assert "reused_steps" not in seen[0]["cache"]
    assert json.loads(Path("perf.json").read_text())["effective"]["cache"]["reused_steps"] == 1
