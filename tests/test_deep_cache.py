"""DeepCache: steps of a UNet that reuse its deep feature map."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import mostly_slow
from deep_unet import by_hand, by_helper
from native import error, record, runner, tensors, with_scheduler
from PIL import Image
from rank_runs import assert_as_predicted, assert_same
from repeated import Repeated

from sglang_gen.backends.native import engine, native_cache
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.schema import Cache, CacheMethod
from sglang_gen.engine import cuda_graphs
from sglang_gen.engine.caching.deep_cache import DeepCache
from sglang_gen.families import unet_shared, unet_spec
from sglang_gen.families.sd.examples import SDExamples
from sglang_gen.families.sdxl.examples import SDXLExamples
from sglang_gen.generate import execute
from sglang_gen.launch.session import Session
from sglang_gen.models.unet import UNet
from sglang_gen.plan import deep_schedule, make

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


UNIFORM = [("sd15", 2, 0), ("sd15", 3, 1), ("sd15", 2, 2), ("sdxl", 2, 0), ("sdxl", 3, 2), ("sdxl", 2, 4)]


@pytest.mark.whole
@pytest.mark.parametrize(("name", "interval", "branch"), mostly_slow(UNIFORM, ("sd15", 2, 0), ("sdxl", 3, 2)))
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


@pytest.mark.whole
@pytest.mark.parametrize("word", SCHEDULES)
@pytest.mark.parametrize(("name", "branch"), mostly_slow(BRANCHES, ("sd15", 3)))
def test_any_schedule_gives_the_latents_of_a_loop_written_by_hand(pipelines, latents, name, branch, word):
    folder = with_scheduler(pipelines[name], "EulerDiscreteScheduler", steps_offset=1)
    ours = latents(folder, word, f"cache.branch={branch}", *GUIDED, steps=7)
    assert error(ours, by_hand(folder, branch, SCHEDULES[word], 7)) <= 1e-5


def test_an_interval_of_one_gives_the_latents_of_a_run_without_a_cache_bit_for_bit(run, latents):
    assert run("sdxl", folder="plain", steps=3).code == 0
    assert np.array_equal(latents("sdxl", "cache.interval=1", steps=3), tensors("plain")["latents"][None])


def decided(name: str = "perf.json") -> list[tuple]:
    rows = json.loads(Path(name).read_text())["cache"]["trace"]
    return sorted((row["image"], row["branch"], row["step"], row["decision"]) for row in rows)


BOTH = ("conditional", "unconditional")


def plan(schedule: str, images: int = 1, branches: tuple[str, ...] = BOTH) -> list[tuple]:
    """The trace of a generation with this schedule, written as `cr` for computed and reused."""
    how = [{"c": "computed", "r": "reused"}[letter] for letter in schedule]
    return sorted(
        (image, branch, step, decision)
        for image in range(images) for branch in branches for step, decision in enumerate(how)
    )  # fmt: skip


def test_the_dump_has_the_decision_of_every_step_image_and_branch(latents):
    latents("sd15", "--num-samples", 3, "sampling.batch_size=2", *GUIDED, "--perf-dump-path", "perf.json", steps=4)
    assert decided() == plan("crrcr", images=3)  # PNDM evaluates its first step twice
    dump = json.loads(Path("perf.json").read_text())
    assert dump["cache"]["steps"] == ["compute", "reuse", "reuse", "compute", "reuse"]
    assert dump["cache"]["reused"] == 3
    assert dump["effective"]["cache"] == {"method": "deepcache", "branch": 0, "interval": 3, "reused_steps": 3}
    assert record("deep")["effective"]["cache"] == dump["effective"]["cache"]


def test_evaluations_of_a_scheduler_of_second_order_count_as_steps(pipelines, latents):
    folder = with_scheduler(pipelines["sd15"], "HeunDiscreteScheduler", steps_offset=1)
    ours = latents(folder, *GUIDED, "cache.branch=1", "--perf-dump-path", "perf.json", steps=4)
    assert decided() == plan("crrcrrc")
    assert error(ours, by_hand(folder, 1, {0, 3, 6}, 4)) <= 1e-5


@pytest.mark.whole
def test_a_step_in_which_guidance_starts_or_stops_is_a_full_one_in_a_batch_and_branch_by_branch(latents):
    given = (*GUIDED, "cache.interval=9", "sampling.guidance_interval=[0.2,0.7]", "--perf-dump-path", "perf.json")
    conditional = plan("crcrrrcr", branches=("conditional",))
    guided = [(0, "unconditional", step, "computed" if step == 2 else "reused") for step in range(2, 6)]
    found = {}
    for way in ("batched", "sequential"):
        found[way] = latents("sdxl", *given, f"sampling.guidance_batching={way}", folder=way, steps=8)
        assert decided() == sorted(conditional + guided)
    assert error(found["sequential"], found["batched"]) <= 1e-5


def test_an_input_image_shortens_the_schedule(latents):
    Image.effect_noise((48, 32), 90).convert("RGB").save("photo.png")
    latents("sdxl", "--image-path", "photo.png", *GUIDED, "cache.interval=2", "--perf-dump-path", "perf.json",
            "--diffusers-kwargs", '{"strength": 0.5}', steps=8)  # fmt: skip
    assert decided() == plan("crcr")


@pytest.mark.whole
@pytest.mark.parametrize(
    "words",
    [("compile.warmup=true", "compile.warmup_steps=3"), ("perf.repeat=2",), ("sampling.batch_size=1",)],
    ids=["warm-up", "repeat", "batch"],
)
def test_nothing_is_left_of_an_earlier_generation(latents, words):
    given = (*GUIDED, "--num-samples", 2, "cache.steps_computation_mask=[1,0,0,1,0]")
    plain = latents("sdxl", *given, "sampling.batch_size=2", steps=5, number=1)
    more = () if words[0].startswith("sampling") else ("sampling.batch_size=2",)
    again = latents("sdxl", *given, *more, *words, "--perf-dump-path", "perf.json", folder="again", steps=5, number=1)
    assert error(again, plain) <= (1e-5 if more == () else 0)
    assert decided() == plan("crrcr", images=2)


def test_a_warm_up_reuses_from_its_second_step_on(latents, caches):
    latents("sdxl", "compile.warmup=true", "compile.warmup_steps=2", *GUIDED,
            "cache.steps_computation_mask=[1,1,1,0]", steps=4)  # fmt: skip
    assert caches[0].seen == ["computed", "reused", "computed", "computed", "computed", "reused"]


@pytest.fixture
def caches(monkeypatch) -> list[DeepCache]:
    """The caches of the runs, each with what it did in every evaluation of all generations."""
    made: list[DeepCache] = []

    class Noting(DeepCache):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            self.seen = []
            made.append(self)

        def before(self, evaluation) -> None:
            super().before(evaluation)
            self.seen.append("reused" if self.reuses else "computed")

    monkeypatch.setattr(native_cache, "DeepCache", Noting)
    return made


@pytest.mark.parametrize("error", [RuntimeError("it failed"), KeyboardInterrupt()], ids=["failure", "Ctrl-C"])
def test_a_generation_that_breaks_off_leaves_nothing_in_the_cache(run, caches, monkeypatch, error):
    evaluate, calls = UNet.evaluate, []

    def failing(network, latents, conditioning):
        if latents.device.type != "meta":
            calls.append(len(latents))
            if len(calls) == 3:
                assert caches[0].kept
                raise error
        return evaluate(network, latents, conditioning)

    monkeypatch.setattr(UNet, "evaluate", failing)
    with contextlib.suppress(KeyboardInterrupt, RuntimeError):
        assert run("sdxl", *DEEP, steps=4).code != 0
    assert len(calls) == 3
    assert (caches[0].kept, caches[0].added, caches[0].computed, caches[0].evaluation) == ({}, None, (), None)


@pytest.mark.slow
def test_jobs_of_a_sweep_that_share_weights_share_no_feature_maps(pipelines):
    usual = (f"model.path={pipelines['sdxl']}", "dtype=float32", "sampling.num_inference_steps=3", "sampling.seed=7",
             "sampling.prompt=a cat", "perf.machine_rates=false", "perf.work=false", "backend=sglang")  # fmt: skip
    runs = [("cache=deepcache", "sampling.height=32", "sampling.width=32"),
            ("cache=none", "sampling.height=32", "sampling.width=32"),
            ("cache=deepcache", "cache.branch=3", "sampling.height=48", "sampling.width=32")]  # fmt: skip

    def frames(session: Session | None, words: tuple[str, ...]) -> np.ndarray:
        return np.asarray(Image.open(execute(compose(Choices((*usual, *words))), session).paths[0]))

    session = Session()
    try:
        shared = [frames(session, words) for words in runs]
    finally:
        session.close()
    alone = [frames(None, words) for words in runs]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(shared, alone, strict=True))
    assert not np.array_equal(shared[0], shared[1])


@pytest.mark.whole
def test_only_the_work_that_was_done_is_counted(latents):
    flops = {}
    for interval in (1, 2):
        words = (f"cache.interval={interval}", "perf.machine_rates=false", "--perf-dump-path", "perf.json")
        latents("sdxl", *words, folder=str(interval), steps=4)
        flops[interval] = json.loads(Path("perf.json").read_text())["work"]["denoising"]["flops"]
    assert 0.5 * flops[1] < flops[2] < 0.6 * flops[1]


@pytest.mark.slow
def test_blocks_are_timed_as_often_as_they_ran(latents):
    latents("sdxl", "cache.branch=1", "perf.blocks=true", "perf.trace=true", "--perf-dump-path", "perf.json", steps=4)
    calls = {row["name"]: row["calls"] for row in json.loads(Path("perf.json").read_text())["block_timings_ms"]}
    often = ("down.0.residuals.0", "up.1.residuals.1", "up.1.residuals.2")
    assert {name for name, count in calls.items() if count == 4} == set(often)
    assert {count for name, count in calls.items() if name not in often} == {2}


LAYOUTS = ("parallel=sp2_tp2", "parallel=tp2", "parallel=ring2", "parallel=ulysses2", "parallel=usp4", "parallel=cfg2",
           "parallel=dp2", "parallel=cfg2_sp2")  # fmt: skip


@pytest.mark.parametrize("branch", mostly_slow((1, 3), 1))
@pytest.mark.parametrize("name", mostly_slow(("sd15", "sdxl"), "sdxl"))
@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "parallel=ring2", "parallel=cfg2"))
def test_every_layout_gives_the_latents_of_one_process_without_a_collective_of_its_own(
    run_on_ranks, name, layout, branch
):
    given = (*DEEP, f"cache.branch={branch}", *GUIDED, "--num-samples", 2, "sampling.batch_size=1",
             "sampling.guidance_interval=[0,0.6]")  # fmt: skip
    counts = {}
    for folder, more in (("one", ()), ("whole", (layout, "cache.interval=1")), ("ranks", (layout,))):
        dump = ("--output-path", folder, "--perf-dump-path", f"{folder}.json")
        done = run_on_ranks(name, *given, *dump, *more, steps=5)
        assert done.code == 0, done.err
        sent = json.loads(Path(f"{folder}.json").read_text())["comm"].get("denoising", {"collectives": {}})
        assert_as_predicted(sent)
        counts[folder] = sum(collective["count"] for collective in sent["collectives"].values())
    assert_same("ranks", "one", 2)
    assert decided("ranks.json") == decided("one.json")
    assert {row[-1] for row in decided("one.json")} == {"computed", "reused"}
    assert counts["ranks"] < counts["whole"] or "cfg2" in layout or "dp2" in layout
    assert counts["ranks"] <= counts["whole"]


@pytest.mark.whole
@pytest.mark.parametrize(("mode", "graphs"), [pytest.param("regional", None, marks=pytest.mark.slow), ("full", 2)])
def test_compiled_networks_are_cached_too(latents, traced, mode, graphs):
    given = (*GUIDED, "--num-samples", 2, "sampling.batch_size=2", "cache.branch=1", "cache.interval=2")
    plain = latents("sdxl", *given, folder="plain", steps=5)
    compiled = latents("sdxl", *given, f"compile={mode}", "compile.warmup=true", "compile.warmup_steps=2", steps=5)
    assert graphs is None or len(traced) == graphs
    assert error(compiled, plain) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_generated_code_gives_the_same_latents(latents, mode):
    given = (*GUIDED, "cache.branch=1", "cache.interval=2")
    plain = latents("sdxl", *given, folder="plain", steps=5)
    assert error(latents("sdxl", *given, f"compile={mode}", steps=5), plain) <= 1e-4


@pytest.mark.parametrize("words", [(), ("sampling.guidance_batching=sequential",)], ids=["batched", "sequential"])
def test_full_and_reused_steps_are_captured_into_a_graph_each(latents, monkeypatch, words):
    made: list[Repeated] = []
    monkeypatch.setattr(Repeated, "made", made, raising=False)
    monkeypatch.setattr(cuda_graphs, "Recorder", Repeated)
    monkeypatch.setattr(make, "CAPTURING", ("cuda", "cpu"))
    given = (*GUIDED, *words, "--num-samples", 2, "sampling.batch_size=1", "cache.branch=2")
    plain = latents("sdxl", *given, folder="plain", steps=5, number=1)
    captured = latents("sdxl", *given, "compile.cuda_graphs=true", steps=5, number=1)
    assert (len(made[0].shapes), made[0].replays) == (2, 20 if words else 10)
    assert np.array_equal(captured, plain)


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
        (("cache.interval=1",), ["interval=1 computes every step in full, so nothing is reused",
                                 "no step was reused, so the cache saved nothing"]),
        (("cache.interval=2", "cache.branch=1", "cache.center=2", "cache.power=1.2"), []),
    ],
)  # fmt: skip
def test_settings_without_effect_are_warned_of(run, words, warnings):
    done = run("sdxl", *DEEP, *words, steps=5)
    assert done.code == 0, done.err
    assert [line for line in done.lines if line.startswith("WARNING: ")] == [
        f"WARNING: cache: {each}" for each in warnings
    ]


def test_settings_of_deepcache_are_warned_of_with_another_cache(run):
    done = run("sd3", "cache=dbcache", "cache.Fn_compute_blocks=1", "cache.max_warmup_steps=1", "cache.branch=1",
               "cache.residual_diff_threshold=0.9", "dry_run=true", steps=5)  # fmt: skip
    assert done.code == 0, done.err
    assert "WARNING: cache: branch has no effect without cache=deepcache" in done.lines
