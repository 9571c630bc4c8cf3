"""DeepCache: steps of a UNet that reuse its deep feature map."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from cases import mostly_slow
from deep_unet import by_hand, by_helper
from native import error, record, runner, tensors, with_scheduler
from PIL import Image
from rank_runs import assert_as_predicted, assert_same
from repeated import Repeated

from sglang_gen.backends.native import native_cache
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.engine import cuda_graphs
from sglang_gen.engine.caching.deep_cache import DeepCache
from sglang_gen.generate import execute
from sglang_gen.launch.session import Session
from sglang_gen.models.unet import UNet
from sglang_gen.plan import make

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


@pytest.mark.whole
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


@pytest.mark.whole
def test_dump_and_log_have_the_decision_of_every_step_image_and_branch(run):
    words = ("--num-samples", 3, "sampling.batch_size=2", *GUIDED, "--perf-dump-path", "perf.json")
    done = run("sd15", *DEEP, *words, steps=4)
    said = [line for line in done.lines if "Step cache" in line]
    assert said == [f"INFO: Step cache: image {image} reused 3 of 5 steps: 1, 2, 4" for image in range(3)]
    assert decided() == plan("crrcr", images=3)  # PNDM evaluates its first step twice
    dump = json.loads(Path("perf.json").read_text())
    assert dump["cache"]["steps"] == ["compute", "reuse", "reuse", "compute", "reuse"]
    assert dump["cache"]["reused"] == 3
    assert dump["effective"]["cache"] == {"method": "deepcache", "branch": 0, "interval": 3, "reused_steps": 3}
    assert record("outputs")["effective"]["cache"] == dump["effective"]["cache"]


@pytest.mark.slow
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


@pytest.mark.whole
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "branch"), mostly_slow([("sdxl", 1), ("sd15", 3)], ("sdxl", 1)))
@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "parallel=tp2"))
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


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "graphs"), [("regional", None), ("full", 2)])
def test_compiled_networks_are_cached_too(latents, traced, mode, graphs):
    given = (*GUIDED, "--num-samples", 2, "sampling.batch_size=2", "cache.branch=1", "cache.interval=2")
    plain = latents("sdxl", *given, folder="plain", steps=5)
    compiled = latents("sdxl", *given, f"compile={mode}", "compile.warmup=true", "compile.warmup_steps=2", steps=5)
    assert graphs is None or len(traced) == graphs
    assert error(compiled, plain) <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_generated_code_gives_the_same_latents(latents, mode):
    given = (*GUIDED, "cache.branch=1", "cache.interval=2")
    plain = latents("sdxl", *given, folder="plain", steps=5)
    assert error(latents("sdxl", *given, f"compile={mode}", steps=5), plain) <= 1e-4


@pytest.mark.whole
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
