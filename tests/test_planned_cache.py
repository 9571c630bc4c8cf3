"""The planned step cache: what a schedule computes, the files that hold one, and the runs that they are refused for."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deep_unet
import pytest
import torch
from deep_unet import ByHand
from native import error, record, tensors, with_scheduler
from plan_files import content, write
from rank_runs import assert_every_rank_as_predicted, assert_same
from repeated import Repeated
from torch import Tensor

from sglang_gen.backends.native import build, engine
from sglang_gen.backends.native.planned_request import fits_guidance
from sglang_gen.engine import cuda_graphs
from sglang_gen.engine.caching.cached_chain import Evaluation, generation
from sglang_gen.engine.caching.planned_cache import PlannedBlocks, PlannedCache, depths_after
from sglang_gen.errors import UserError
from sglang_gen.models.chain import Chain
from sglang_gen.plan import make
from sglang_gen.plan.cache_plan import BINDINGS, CachePlan, check_bound, read_cache_plan

MIXED = [None, 1, None, 0, 2, None]
RUN = ("--prompt", "a cat", "--seed", "7", "--dtype", "float32", "--height", "32", "--width", "32", "--backend",
       "sglang", "output.latents=true")  # fmt: skip


@pytest.fixture
def generate(sglang, pipelines):
    def run(name: str, folder: str, *words: object, steps: int = len(MIXED)) -> Any:
        done = sglang("generate", "--model-path", pipelines[name], *RUN, "--output-path", folder,
                      "--num-inference-steps", steps, *words)  # fmt: skip
        assert done.code == 0, done.err
        return done

    return run


class ChainByHand(Chain):
    """Counts the calls of a network that is called `calls` times in a step, and does what the schedule says."""

    def __init__(self, schedule: Sequence[int | None], calls: int) -> None:
        super().__init__()
        self.schedule, self.calls, self.count = schedule, calls, 0
        self.before: list[list[Tensor]] = [[] for _ in range(calls)]  # streams before each block, of a computed step
        self.after: list[Tensor] = [torch.empty(0)] * calls

    def forward(self, blocks: Any, state: Any, conditions: Any, *shared: Any) -> Any:
        step, call = divmod(self.count, self.calls)
        self.count += 1
        depth, streams = self.schedule[step], []
        for index, (block, condition) in enumerate(zip(blocks, conditions, strict=True)):
            if index == depth:
                break
            streams.append(state[0])
            state = block(*state, *condition, *shared)
        if depth is None:
            self.before[call], self.after[call] = streams, state[0]
            return state
        return (state[0] + (self.after[call] - self.before[call][depth]), *state[1:])


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "words", "calls"),
    [
        ("sd3", (), 1),
        ("sd3", ("sampling.guidance_batching=sequential",), 2),
        ("flux", ("--num-samples", 2, "sampling.batch_size=2"), 1),
    ],
)
def test_a_planned_run_computes_what_a_loop_written_by_hand_does(generate, pipelines, monkeypatch, name, words, calls):
    file = write(pipelines[name], MIXED)
    generate(name, "planned", "cache=planned", file, *words)
    with monkeypatch.context() as patch:
        patch.setattr(
            build, "compute_every_step", lambda built: setattr(built.network, "chain", ChainByHand(MIXED, calls))
        )
        generate(name, "hand", *words)
    generate(name, "exact", *words)
    planned, hand, exact = (tensors(folder)["latents"] for folder in ("planned", "hand", "exact"))
    assert (planned == hand).all()
    assert (planned != exact).any()
    assert record("planned")["effective"]["cache"]["reused_steps"] == 3


@pytest.mark.whole
def test_a_plan_that_computes_all_steps_changes_no_bit_and_says_that_it_saves_nothing(generate, pipelines):
    file = write(pipelines["sd3"], [None] * 3)
    done = generate("sd3", "planned", "cache=planned", file, steps=3)
    generate("sd3", "exact", steps=3)
    assert (tensors("planned")["latents"] == tensors("exact")["latents"]).all()
    assert [line for line in done.lines if "WARNING" in line] == [
        "WARNING: cache: no step was reused, so the cache saved nothing"
    ]


@pytest.mark.slow
def test_steps_inside_and_outside_of_the_interval_of_guidance_are_reused_apart(generate, pipelines):
    words = ("sampling.guidance_interval=[0,0.5]",)
    file = write(pipelines["sd3"], [None, 1, 0, None, 2, 0], *words)
    generate("sd3", "planned", "cache=planned", file, *words, "--perf-dump-path", "perf.json")
    dump = json.loads(Path("perf.json").read_text())
    assert dump["cache"]["steps"] == ["compute", "reuse", "reuse", "compute", "reuse", "reuse"]
    branches = [(row["step"], row["branch"]) for row in dump["cache"]["trace"]]
    assert (2, "unconditional") in branches
    assert (3, "unconditional") not in branches


LAYOUTS = [
    ("sd3", "parallel=cfg2"),
    pytest.param("sd3", "parallel=tp2", marks=pytest.mark.slow),
    pytest.param("sd3", "parallel=ring2", marks=pytest.mark.slow),
    pytest.param("flux", "parallel=ulysses2", marks=pytest.mark.slow),
    pytest.param("flux", "parallel.dp_size=2", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_plan_holds_for_every_layout(run_on_ranks, pipelines, name, layout):
    words = ("--num-samples", 3, "sampling.batch_size=2", "--backend", "sglang", "cache=planned")
    file = write(pipelines[name], MIXED)
    for folder, more in (("one", ()), ("many", (layout, "--perf-dump-path", "many.json"))):
        done = run_on_ranks(name, *words, file, *more, "--output-path", folder, steps=len(MIXED))
        assert done.code == 0, done.err
    assert_same("many", "one", 3)
    if "dp" not in layout:  # its ranks send nothing while they denoise
        assert_every_rank_as_predicted(json.loads(Path("many.json").read_text()), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "graphs"), [("compile=regional", None), ("compile=full", 4)])
def test_compiled_blocks_and_networks_follow_the_plan(generate, pipelines, traced, compiled, graphs):
    """A whole network has one graph for computed steps and one for each depth."""
    file = write(pipelines["sd3"], MIXED)
    generate("sd3", "compiled", "cache=planned", file, compiled, "compile.warmup=true", "compile.warmup_steps=4")
    assert traced
    assert graphs is None or len(traced) == graphs
    generate("sd3", "eager", "cache=planned", file)
    assert torch.allclose(*(torch.tensor(tensors(folder)["latents"]) for folder in ("compiled", "eager")), atol=1e-5)


@pytest.mark.whole
def test_each_depth_is_captured_into_a_graph_of_its_own(generate, pipelines, monkeypatch):
    made: list[Repeated] = []
    monkeypatch.setattr(Repeated, "made", made, raising=False)
    monkeypatch.setattr(cuda_graphs, "Recorder", Repeated)
    monkeypatch.setattr(make, "CAPTURING", ("cuda", "cpu"))
    file = write(pipelines["flux"], MIXED)
    for folder, words in (("plain", ()), ("graphs", ("compile.cuda_graphs=true",))):
        generate("flux", folder, "cache=planned", file, *words)
    assert (len(made[0].shapes), made[0].replays) == (4, 6)
    assert (tensors("graphs")["latents"] == tensors("plain")["latents"]).all()


class BranchesByHand(ByHand):
    """Turns back at another skip connection after each computed evaluation."""

    schedule: tuple[int | None, ...] = ()

    @property
    def branch(self) -> int:
        return next(depth for depth in self.schedule[max(self.count - 1, 0) :] if depth is not None)

    @branch.setter
    def branch(self, _: int) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_unet_turns_back_at_the_skip_connections_of_the_plan(sglang, pipelines, monkeypatch, name):
    schedule = (None, 1, None, 3, 3, None, 0)
    folder = with_scheduler(pipelines[name], "EulerDiscreteScheduler", steps_offset=1)
    words = ("sampling.width=48", "sampling.guidance_scale=3.0")
    file = write(folder, list(schedule), *words, blocks=18)
    done = sglang("generate", "--model-path", folder, *RUN[:-5], *RUN[-3:], "--width", 48, "--guidance-scale", 3,
                  "--num-inference-steps", 7, "cache=planned", file)  # fmt: skip
    assert done.code == 0, done.err
    monkeypatch.setattr(deep_unet, "ByHand", type("Branches", (BranchesByHand,), {"schedule": schedule}))
    expected = deep_unet.by_hand(folder, 0, {0, 2, 5}, 7)
    assert error(tensors("outputs")["latents"][None], expected) <= 1e-5


@pytest.mark.whole
def test_a_plan_of_a_skip_connection_that_a_unet_lacks_is_refused(sglang, pipelines):
    file = write(pipelines["sd15"], [None, 9, None], blocks=18)
    done = sglang("generate", "--model-path", pipelines["sd15"], *RUN, "--num-inference-steps", 3, "cache=planned",
                  file, "dry_run=true")  # fmt: skip
    assert (done.code, "the schedule of plan.json does not fit this run" in done.err) == (2, True), done.err


@pytest.mark.slow
def test_a_reused_step_counts_only_the_blocks_that_it_computes(generate, pipelines):
    """The work of the dump, from the decisions of the run."""
    flops = []
    for depths in ([None, 0, 0], [None, None, 0], [None, None, None]):
        file = write(pipelines["sd3"], depths)
        generate("sd3", "out", "cache=planned", file, "--perf-dump-path", "perf.json", steps=3)
        flops.append(json.loads(Path("perf.json").read_text())["work"]["denoising"]["flops"])
    assert flops[0] < flops[1] < flops[2]
    assert flops[1] - flops[0] == flops[2] - flops[1]


def blocks_that_add(values: Sequence[float]) -> list[Any]:
    return [lambda x, text, value=value: (x + value, text) for value in values]


def evaluate(cache: PlannedCache, step: int, branches: tuple[int, ...], blocks: list[Any], x: Tensor) -> Tensor:
    evaluation = Evaluation(step, step, branches, branches, len(x) // len(branches))
    cache.before(evaluation)
    image: Tensor = cache(blocks, (x, None), [()] * len(blocks))[0]
    cache.after(evaluation)
    return image


def test_a_cache_keeps_only_the_residuals_that_are_used_later_and_none_after_the_generation():
    cache = PlannedBlocks((None, 1, 0, None, 2))
    assert cache.needed == [(0, 1), (), (), (2,), ()]
    blocks, x = blocks_that_add((1.0, 2.0, 3.0)), torch.zeros(1, 1, 1)
    sums, kept = [], []
    with generation([cache]):
        for step in range(5):
            sums.append(evaluate(cache, step, (0,), blocks, x + step).item())
            kept.append({depth: residual.item() for depth, residual in cache.kept[0,].items()})
    assert sums == [6, 7, 8, 9, 10]
    assert kept == [{0: 6, 1: 5}] * 3 + [{2: 3}] * 2
    assert cache.kept == {}


def test_depths_are_those_of_the_steps_that_follow():
    assert depths_after((None, None, 3, 1, 3, None)) == [(), (1, 3), (), (), (), ()]


def test_a_warm_up_takes_every_depth_of_the_schedule_in_turn():
    cache = PlannedBlocks((None, None, 0, 2))
    with generation([cache], warming=True):
        for step in range(6):
            evaluate(cache, step, (0,), blocks_that_add((1.0, 2.0, 3.0)), torch.zeros(1, 1, 1))
    assert [choice and choice[0] for _, choice in cache.choices] == [None, 0, 2, None, 0, 2]


def test_a_warm_up_computes_a_step_with_other_branches_than_the_last_computed_one():
    cache = PlannedBlocks((None, 0))
    with generation([cache], warming=True):
        for step, branches in enumerate(((1, 0), (0,))):
            evaluate(cache, step, branches, blocks_that_add((1.0,)), torch.zeros(len(branches), 1, 1))
    assert {each.decision for each in cache.decisions} == {"computed"}


@pytest.mark.parametrize(
    ("depths", "guided", "fits"),
    [
        ([None, 0, None, 0], [True, True, False, False], True),
        ([None, 0, 0, 0], [True, True, False, False], False),
        ([None, None, 0], [False, True, False], False),
        ([None, 2, 1], [True, True, True], True),
    ],
)
def test_a_step_is_reused_only_from_one_that_was_guided_alike(depths, guided, fits):
    assert fits_guidance(depths, guided) is fits


def facts() -> dict[str, Any]:
    return {
        "pipeline": "StableDiffusion3Pipeline", "network": "a" * 64, "weights": "b" * 64, "size": [32, 32, 1],
        "scheduler": "FlowMatchEulerDiscreteScheduler", "scheduler_config": "c" * 64, "steps": 2,
        "timesteps": [1000.0, 500.0], "dtype": "float32", "guidance_scale": 4.0, "guidance_interval": None,
        "guidance_arguments": {},
    }  # fmt: skip


OTHER = {
    "pipeline": "FluxPipeline", "network": "d" * 64, "weights": "d" * 64, "size": [32, 64, 1],
    "scheduler": "FlowMatchHeunDiscreteScheduler", "scheduler_config": "d" * 64, "steps": 3,
    "timesteps": [1000.0, 501.0], "dtype": "bfloat16", "guidance_scale": 5.0, "guidance_interval": [0.0, 0.5],
    "guidance_arguments": {"guidance_rescale": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("key", BINDINGS)
def test_a_run_that_differs_from_that_of_the_plan_is_refused_by_what_differs(key):
    assert OTHER.keys() == BINDINGS.keys() == facts().keys()
    plan = CachePlan(facts(), (None, 0), 3, 3)
    check_bound(plan, "plan.json", facts())
    with pytest.raises(UserError, match=r"^cache\.plan_file: plan\.json was calibrated with ") as error:
        check_bound(plan, "plan.json", facts() | {key: OTHER[key]})
    assert BINDINGS[key] in str(error.value)
    assert "calibrate a plan for this run with `sglang tune cache`" in str(error.value)


@pytest.mark.parametrize(("timesteps", "same"), [([1000.0, 500.01], True), ([1000.0], False), ([1000.0, 0.0], False)])
def test_timesteps_agree_up_to_rounding(timesteps, same):
    plan = CachePlan(facts(), (None, 0), 3, 3)
    if same:
        check_bound(plan, "plan.json", facts() | {"timesteps": timesteps})
    else:
        with pytest.raises(UserError, match="the timesteps"):
            check_bound(plan, "plan.json", facts() | {"timesteps": timesteps})


def test_weights_that_are_not_downloaded_yet_are_compared_later():
    check_bound(CachePlan(facts(), (None, 0), 3, 3), "plan.json", facts() | {"weights": None})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--num-inference-steps", 5), "with sampling.num_inference_steps 6, and this run has 5"),
        (("--dtype", "bfloat16"), 'with dtype "float32", and this run has "bfloat16"'),
        (("--guidance-scale", 3), "with sampling.guidance_scale 7.5, and this run has 3.0"),
        (("--width", 48), "with the size [height, width, frames] [32, 32, 1], and this run has [32, 48, 1]"),
        (("sampling.guidance_interval=[0,0.5]",), "with sampling.guidance_interval null, and this run has [0.0, 0.5]"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_another_run_is_refused_before_a_weight_is_read(sglang, pipelines, monkeypatch, words, sentence, dry):
    monkeypatch.setattr(engine, "build", None)  # no network is built
    file = write(pipelines["sd3"], MIXED)
    given = {"--num-inference-steps": 6, "--dtype": "float32", "--height": 32, "--width": 32, "--seed": 7}
    given |= {words[0]: words[1]} if len(words) == 2 else {}
    overrides = words if len(words) == 1 else ()
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a cat", *itertools.chain(*given.items()),
                  *overrides, "cache=planned", file, *(["dry_run=true"] if dry else []))  # fmt: skip
    assert (done.code, f"plan.json was calibrated {sentence}" in done.err) == (2, True), done.err


def test_other_weights_are_refused(sglang, pipelines, tmp_path):
    file = write(pipelines["sd3"], MIXED)
    other = tmp_path / "tiny-sd3-trained"
    shutil.copytree(pipelines["sd3"], other)
    path = next((other / "transformer").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(bytes(data))
    done = sglang("generate", "--model-path", other, *RUN, "--num-inference-steps", 6, "cache=planned", file)
    assert (done.code, "with other weights of the network;" in done.err) == (2, True), done.err


BROKEN = [
    ("{", "cannot be read: it is not valid JSON in line 1"),
    ("[]", "is not a cache plan"),
    ('{"format": "something"}', "is not a cache plan"),
    ("\udcff", "cannot be read: it is not UTF-8 text"),
]


@pytest.mark.parametrize(("text", "sentence"), BROKEN, ids=[sentence for _, sentence in BROKEN])
def test_a_file_that_is_no_plan_is_refused_in_one_sentence(text, sentence):
    Path("plan.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        read_cache_plan("plan.json")
    assert str(error.value).startswith(f"cache.plan_file: plan.json {sentence}")


DAMAGES: list[dict[str, Any]] = [
    {"depths": []}, {"depths": [0, None]}, {"depths": [None, 3]}, {"depths": [None, -1]}, {"depths": [None, True]},
    {"depths": [None, "1"]}, {"depths": None}, {"blocks": None}, {"blocks": "3"}, {"computed_blocks": 1.5},
    {"bound_to": []}, {"bound_to": {"dtype": "float32"}},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=json.dumps)
def test_a_damaged_plan_is_refused(damage):
    whole = {"format": "sglang-gen cache plan", "schema_version": 1, "bound_to": facts(), "blocks": 3,
             "depths": [None, 2], "computed_blocks": 5}  # fmt: skip
    Path("plan.json").write_text(json.dumps(whole))
    assert read_cache_plan("plan.json").computed_blocks == 5
    Path("plan.json").write_text(json.dumps(whole | damage))
    with pytest.raises(UserError, match=r"^cache\.plan_file: plan\.json is damaged; "):
        read_cache_plan("plan.json")


def test_a_plan_of_a_later_version_and_a_missing_one_are_refused():
    Path("plan.json").write_text('{"format": "sglang-gen cache plan", "schema_version": 2}')
    with pytest.raises(UserError, match=r"plan\.json has the version 2 of cache plans, and this is 1"):
        read_cache_plan("plan.json")
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file or directory"):
        read_cache_plan("none.json")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("cache=planned",), "cache=planned needs cache.plan_file, the file of a schedule"),
        (("cache.plan_file=plan.json",), "cache.plan_file is the schedule of cache=planned; add cache=planned or"),
        (("cache=dbcache", "cache.plan_file=plan.json"), "cache.plan_file is the schedule of cache=planned; add"),
        (("cache=planned", "cache.plan_file=a", "cache.Fn_compute_blocks=1"), "cache.Fn_compute_blocks has no effect"),
        (("cache=planned", "cache.plan_file=a", "--cache-dit-config", '{"a": 1}'), "cache.cache_dit_config has no eff"),
        (
            ("cache=planned", "cache.plan_file=a", "--backend", "diffusers"),
            "cache=planned is supported only by the nat",
        ),
        (("cache=planned", "cache.plan_file=a", "cache.interval=2"), "cache.interval has no effect with cache=planned"),
    ],
)
def test_settings_that_contradict_the_planned_cache_are_refused(sglang, words, sentence):
    done = sglang("generate", "--prompt", "a", *words, "dry_run=true")
    assert (done.code, sentence in done.err) == (2, True), done.err


@pytest.mark.whole
def test_a_record_repeats_the_plan_and_tells_if_its_file_has_changed(generate, sglang, pipelines):
    file = write(pipelines["sd3"], MIXED)
    generate("sd3", "first", "cache=planned", file)
    assert record("first")["run"]["cache"]["plan_file"] == "plan.json"
    again = sglang("generate", "--config", "first/generated_image_0.json", "--output-path", "again")
    assert again.code == 0, again.err
    assert (tensors("again")["latents"] == tensors("first")["latents"]).all()
    Path("plan.json").write_text(json.dumps(content(pipelines["sd3"], [None, None, 0, 0, 0, 0])))
    changed = sglang("generate", "--config", "first/generated_image_0.json", "--output-path", "other")
    assert "cache.plan_file: plan.json is not the file that the record was made with" in changed.err
