"""sglang tune: its options, the space of candidates, what it writes, and how it ends. Measurements are synthetic here;
the slow test measures."""

import html
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import tiny

from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose_partly
from sglang_gen.config.hydra_loader import open_loader
from sglang_gen.config.schema import get, leaves, plain
from sglang_gen.errors import UserError
from sglang_gen.plan import make
from sglang_gen.tune import pruning
from sglang_gen.tune.axes import TUNED_AXES
from sglang_gen.tune.candidate import BASE, Candidate, CandidateError, CandidateVerdict, Observation
from sglang_gen.tune.experiment_file import OUTSIDE, experiment_text, round_trip, write_experiment
from sglang_gen.tune.measuring import Machine, _observation
from sglang_gen.tune.space import Space
from sglang_gen.tune.tuning_options import TuningOptions

SMALL = ("--num-inference-steps", "4", "--height", "64", "--width", "64")
# log(time / time of the base) and PSNR of each change
EFFECTS = {"dtype=float16": (-0.5, 45.0), "dtype=bfloat16": (-0.3, 50.0), "compile=full": (-0.4, 60.0),
           "sampling.guidance_interval=[0,0.8]": (-0.2, 33.0)}  # fmt: skip


def options(axes: tuple[str, ...] | None = None, **words: object) -> TuningOptions:
    given = {"min_psnr": 34.0, "max_memory": math.inf, "budget": 600.0, "baseline": (), "name": None, "axes": axes}
    return TuningOptions(**{**given, **words})


def space(*words: str, axes: tuple[str, ...] | None = None, flags: dict | None = None, **others: object) -> Space:
    config_dir = others.pop("config_dir", None)
    return Space(Choices(words, flags or {}, config_dir=config_dir), options(axes, **others))


def one(axis: str, word: str) -> Candidate:
    return Candidate(((axis, word),))


@pytest.fixture
def synthetic(monkeypatch):
    """Measurements without a machine; what is measured, in order. A measurement of `stops` is interrupted."""
    seen: list[Candidate] = []
    stops: set[int] = set()

    def measure(self: Machine, candidate: Candidate, images: int) -> Observation:
        seen.append(candidate)
        if len(seen) in stops:
            raise KeyboardInterrupt
        self.jobs.setdefault(candidate, len(self.jobs))
        found = [EFFECTS.get(word, (0.05, 60.0)) for word in candidate.words]
        error = 10**-5.5 + sum(10 ** (-psnr / 10) for _, psnr in found)
        seconds = math.exp(sum(shift for shift, _ in found))
        worst = {"index": 1, "prompt": "a calm lake", "seed": 0, "value": 40.0}
        return Observation(seconds, -10 * math.log10(error), 5e8, seconds * images / 10, worst=worst)

    monkeypatch.setattr(Machine, "measure", measure)
    monkeypatch.setattr(Machine, "prepare", lambda self: setattr(self, "reference", "kept"))
    return seen, stops


WRONG = {
    (): "sglang tune needs the PSNR that every image must keep, such as --min-psnr 34",
    ("--min-psnr", "-3"): "--min-psnr: '-3' is not a number of dB between 0 and 100, such as 34",
    ("--min-psnr", "nan"): "--min-psnr: 'nan' is not a number of dB between 0 and 100, such as 34",
    ("--min-psnr", "high"): "--min-psnr: 'high' is not a number of dB between 0 and 100, such as 34",
    ("--min-psnr", "34", "--budget", "0m"): "--budget: '0m' is not a duration above 0 in s, m or h, such as 20m or",
    ("--min-psnr", "34", "--budget", "20"): "--budget: '20' is not a duration above 0 in s, m or h, such as 20m or",
    ("--min-psnr", "34", "--budget", "3 days"): "--budget: '3 days' is not a duration above 0 in s, m or h",
    ("--min-psnr", "34", "--budget", "m20"): "--budget: 'm20' is not a duration above 0 in s, m or h",
    ("--min-psnr", "34", "--max-memory", "4"): "--max-memory: '4' is not an amount above 0 in MB, GB, MiB or GiB",
    ("--min-psnr", "34", "--max-memory", "0GB"): "--max-memory: '0GB' is not an amount above 0 in MB, GB, MiB or GiB",
    ("--min-psnr", "34", "--max-memory", "4 parsecs"): "--max-memory: '4 parsecs' is not an amount above 0",
    ("--min-psnr", "34", "--axes", "dtype,,"): "--axes: 'dtype,,' is not a list of different names",
    ("--min-psnr", "34", "--axes", "compiler"): "--axes: there is no axis 'compiler'; did you mean 'compile'?",
    ("--min-psnr", "34", "--axes", "dtype", "--dtype", "float32"): "--axes names dtype, and the request sets it",
    ("--min-psnr", "34", "--time", "cpu"): "--time: 'cpu' is not one of elapsed and processor",
    ("--min-psnr", "34", "--time", "processor", "parallel=tp2"): "--time processor is that of one process on a CPU",
    ("--min-psnr", "34", "--name", "a/b"): "--name: 'a/b' is not the name of an experiment: letters, digits and",
    ("--min-psnr", "34", "--name", "quick_look"): "--name: there is an experiment 'quick_look' already",
    ("--min-psnr", "34", "--baseline", "diffusers"): "--baseline: 'diffusers' is not a list of overrides in quotes",
    ("--min-psnr", "34", "--baseline", "attention=nokernel"): "--baseline: Unknown option 'nokernel' of the group",
    ("--min-psnr", "34", "--baseline", "sampling.batch_size=0"): "--baseline: sampling.batch_size is 0; it must be at",
    ("--min-psnr", "34", "-m"): "sglang tune decides itself what it runs; leave out --multirun",
    ("--min-psnr", "34", "--perf-dump-path", "a.json"): "sglang tune decides output.perf_dump_path itself; leave it",
    ("--min-psnr", "34", "perf.repeat=3"): "sglang tune decides perf.repeat itself; leave it out",
    ("--min-psnr", "34", "tracking=csv"): "sglang tune keeps its results in its own folder; leave out tracking",
    ("--min-psnr", "34", "compile=none,full"): "'compile=none,full' is a sweep; leave the setting out to search it",
    ("--min-psnr", "34", "model=sdxl", "model.weights=random"): "--min-psnr compares images, and these are noise",
    ("--min-psnr", "34", "--num-samples", "4"): "--num-samples needs a prompt: without one, the samples are those of",
    ("--min-psnr", "34", "--min-psnr", "35"): "--min-psnr is given twice",
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_request_is_refused_in_one_sentence(sglang, words):
    done = sglang("tune", *words)
    assert done.code == 2
    assert WRONG[words] in done.lines[-1]


def test_without_an_axis_there_is_nothing_to_search(sglang):
    words = ("dtype=float32", "compile=none", "cache=none", "sampling.guidance_interval=null", "attention=sdpa",
             "parallel=single")  # fmt: skip
    done = sglang("tune", "--min-psnr", "34", *words)
    assert (done.code, "Nothing is left to search: the request sets every axis" in done.lines[-1]) == (2, True)


@pytest.mark.whole  # which builds a pipeline
def test_a_model_that_makes_videos_is_refused(sglang, tmp_path):
    folder = tiny.wan(tmp_path / "tiny-wan")
    done = sglang("tune", "--min-psnr", "34", "--model-path", folder, "--prompt", "a cat", *SMALL)
    assert (done.code, done.lines[-1]) == (2, "ERROR: --min-psnr compares images, and WanPipeline makes video")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("0.5h", 1800), ("5min", 300)]
)
def test_a_budget_is_a_duration(text, seconds):
    from sglang_gen.tune.tuning_options import _duration

    assert _duration(text) == seconds


@pytest.mark.parametrize(("text", "count"), [("4GB", 4e9), ("512 MiB", 2.0**29), ("1.5gib", 1.5 * 2**30), ("7MB", 7e6)])
def test_a_memory_bound_is_an_amount_with_a_unit(text, count):
    from sglang_gen.tune.tuning_options import _memory

    assert _memory(text) == count


def test_the_help_names_every_option_and_axis(sglang):
    done = sglang("tune", "--help")
    assert done.code == 0
    for word in (*(axis.name for axis in TUNED_AXES), "--min-psnr", "--max-memory", "--budget", "--axes", "--baseline",
                 "--name", "--output-path"):  # fmt: skip
        assert re.search(rf"^ +{word} ", done.out, re.M), word


@pytest.mark.whole
def test_a_dry_run_lists_the_candidates_with_their_obstacles_and_measures_nothing(sglang, synthetic):
    done = sglang("tune", "--min-psnr", "34", "--axes", "dtype,compile", "dry_run=true")
    assert done.code == 0
    assert done.out.startswith("dtype:\n  dtype=float32: it is the same as base\n  dtype=bfloat16\n  dtype=float16\n")
    assert "  compile=graphs: compile.cuda_graphs needs a GPU" in done.out
    assert not synthetic[0]
    assert not Path("outputs").exists()
    found = json.loads(sglang("tune", "--min-psnr", "34", "--axes", "dtype", "dry_run=json").out)
    assert found["dtype"]["dtype=bfloat16"] is None


def test_the_base_is_the_request_and_what_it_sets_is_not_searched(tmp_path):
    searched = space("parallel=single", "compile.regional=false", flags={"dtype": plain_dtype("float32")})
    assert list(searched.axes) == ["cache", "guidance", "attention"]
    assert searched.fixed == ["compile", "dtype", "layout"]
    (tmp_path / "mine.yaml").write_text("cache: none\nattention: {backend: math}\n")
    of_file = Space(Choices(file=str(tmp_path / "mine.yaml")), options())
    assert list(of_file.axes) == ["dtype", "compile", "guidance", "layout"]


def plain_dtype(name: str) -> object:
    from sglang_gen.config.schema import DType

    return DType[name]


def test_an_experiment_fixes_the_axes_that_it_sets(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nattention: {backend: math}\n")
    searched = space("experiment=mine", config_dir=str(tmp_path))
    assert "attention" in searched.fixed
    assert "attention" not in searched.axes


def test_the_steps_are_searched_only_if_they_are_named():
    assert "steps" not in space().axes
    assert space(axes=("steps",)).axes == {
        "steps": tuple(f"sampling.num_inference_steps={count}" for count in (21, 14, 24, 17))
    }


def test_the_options_of_the_groups_are_the_candidates(tmp_path):
    """Also those of a folder of the user; nothing is listed twice."""
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "mine.yaml").write_text("backend: math\n")
    searched = space(axes=("attention", "cache"), config_dir=str(tmp_path))
    assert "attention=mine" in searched.axes["attention"]
    assert searched.refusal(one("attention", "attention=mine")) is None
    assert searched.refusal(one("attention", "attention=math")) == "it is the same as attention=mine"
    assert {f"cache={name}" for name in ("none", "dbcache", "deepcache", "scm_fast")} < set(searched.axes["cache"])
    assert "cache=dbcache cache.Fn_compute_blocks=1" in searched.axes["cache"]


def test_what_the_plan_refuses_is_a_candidate_with_its_reason():
    searched = space(axes=("compile", "layout", "attention"))
    assert "needs a GPU" in searched.refusal(one("compile", "compile=graphs"))
    assert "does not run here" in searched.refusal(one("attention", "attention=cudnn"))
    assert searched.refusal(one("compile", "compile=none")) == "it is the same as base"
    assert "data parallelism makes no image faster" in searched.refusal(one("layout", "parallel=dp2"))
    with pytest.raises(UserError, match="needs a GPU"):
        searched.planned(one("compile", "compile=graphs"))


def test_a_change_without_effect_is_not_measured():
    searched = space("sampling.guidance_scale=1", axes=("guidance",))
    reason = searched.refusal(one("guidance", "sampling.guidance_interval=[0,0.8]"))
    assert reason.startswith("sampling.guidance_interval has no effect")


@pytest.mark.whole
def test_the_reference_is_the_base_in_float32_if_the_dtype_is_searched():
    free = space("compile=full", axes=("dtype", "cache"))
    assert (free.reference().run.dtype.name, free.reference().run.quality.reference) == ("float32", "auto")
    fixed = space("dtype=bfloat16", axes=("cache",))
    assert fixed.reference().run.dtype.name == "bfloat16"
    named = space("quality.reference=mine", axes=("cache",))
    assert named.stated_reference == "mine"


def test_the_embedded_model_is_tuned_over_its_manifest_and_others_over_their_prompts():
    assert space(axes=("dtype",)).images == 16
    assert space("quality=landscape64", axes=("dtype",)).images == 64
    named = space(axes=("dtype",), flags={"sampling.prompt": "a lake", "sampling.num_samples": 3})
    assert (named.images, named.base_plan.run.quality.manifest, named.base_plan.run.sampling.seed) == (3, None, 0)


def test_the_first_images_are_the_first_samples_of_the_manifest(tmp_path):
    searched = space(axes=("dtype",))
    machine = Machine(searched, tmp_path, None, 0.0)
    machine.reference = "kept"
    part, whole = (machine.run_of(BASE, count).run for count in (2, 16))
    samples = [sample for batch in searched.base_plan.batches for sample in batch]
    planned = make.make_plan(machine.run_of(BASE, 2), searched.card)
    assert [sample for batch in planned.batches for sample in batch] == samples[:2]
    assert (part.quality.manifest, whole.quality.manifest) == (None, "landscape16")
    assert part.quality.reference == whole.quality.reference == "kept"
    assert (part.compile.warmup, part.compile.warmup_steps) == (True, 28)


@pytest.mark.whole
def test_candidates_are_pruned_by_the_estimated_memory():
    searched = space(axes=("dtype",), max_memory=1e7)
    assert "it needs at least" in searched.refusal(one("dtype", "dtype=bfloat16"))
    assert "--max-memory is 0.01 GB" in searched.refusal(one("dtype", "dtype=bfloat16"))
    assert space(axes=("dtype",), max_memory=4e9).refusal(one("dtype", "dtype=bfloat16")) is None


def test_candidates_are_pruned_by_their_predicted_time(monkeypatch):
    searched = space(axes=("dtype", "compile"))
    times = {"float32": 10.0, "bfloat16": 14.0, "float16": 12.0}
    memory = {"total": 1.0}
    monkeypatch.setattr(
        pruning, "estimate", lambda plan: {"memory": memory, "prediction": {"step_ms": times[plan.dtype]}}
    )
    assert searched.slowness(one("dtype", "dtype=bfloat16")) == pytest.approx(1.4)
    assert searched.slowness(one("dtype", "dtype=float16")) is None
    assert searched.refusal(one("dtype", "dtype=bfloat16")) is None


def test_intervals_and_batch_sizes_that_come_to_the_same_are_one_candidate():
    flags = {"sampling.prompt": "a", "sampling.num_samples": 2, "sampling.num_inference_steps": 4}
    searched = space(axes=("guidance", "throughput"), flags=flags)
    found = {word: searched.refusal(one("guidance", word)) for word in searched.axes["guidance"]}
    end = "sampling.guidance_interval=[0,{}]".format
    assert found[end(0.9)] == "it is the same as base"
    measured = [word for word, reason in found.items() if reason is None]
    assert len(measured) == len({round(4 * float(word.rpartition(",")[2].rstrip("]"))) for word in found} - {4})
    sizes = {word: searched.refusal(one("throughput", word)) for word in searched.axes["throughput"] if "batch" in word}
    assert [reason for reason in sizes.values() if reason is None] == [None]


def test_by_processor_time_layouts_of_several_processes_are_left_out():
    searched = space(axes=("layout",), by_processor=True)
    assert searched.refusal(one("layout", "parallel=tp2")) == "several processes cannot be compared by processor time"
    report = {"repeats": [{"total_duration_ms": 4000.0, "cpu_duration_ms": 1000.0}], "memory_checkpoints": {},
              "quality": {"summary": {"psnr": {"worst": None}}}}  # fmt: skip
    assert [_observation(report, 2, 9.0, by_processor).seconds for by_processor in (False, True)] == [2.0, 0.5]


def test_layouts_with_more_processes_than_processors_are_pruned(monkeypatch):
    monkeypatch.setattr("sglang_gen.env.cpu_count", lambda: 2)
    searched = space(axes=("layout",))
    assert "4 processes share 2 processors" in searched.refusal(one("layout", "parallel=usp4"))
    assert searched.refusal(one("layout", "parallel=tp2")) is None


REQUESTS = {
    "nothing": ((), {}),
    "groups and keys": (("sampling=draft", "sampling.guidance_scale=3", "offload=none", "compile=full"), {}),
    "flags": ((), {"sampling.negative_prompt": "${HOME} fog: 'grey', \\ \"x\"", "sampling.guidance_scale": 2.5}),
    "an experiment": (("experiment=quick_look",), {}),
    "a mapping": (("backend.diffusers_kwargs.clip_skip=1",), {}),
    "another model": (("model=sdxl",), {}),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", REQUESTS)
def test_the_composed_experiment_equals_the_run_of_the_candidate(tmp_path, name):
    words, flags = REQUESTS[name]
    searched = space(*words, axes=("dtype", "attention", "guidance"), flags=flags)
    interval = ("guidance", "sampling.guidance_interval=[0,0.8]")
    changes = (
        ("dtype", "dtype=bfloat16"),
        *(() if name == "a mapping" else (interval,)),
        ("attention", "attention=math"),
    )
    candidate = Candidate(changes if name != "a mapping" else changes[:1])
    write_experiment(tmp_path / "experiment" / "mine.yaml", searched, candidate, ["1.5x"])
    assert round_trip(searched, candidate, tmp_path, "mine") == []
    loader = open_loader(str(tmp_path))
    composed, _ = compose_partly(Choices(("experiment=mine",), config_dir=str(tmp_path)), loader)
    expected = searched.planned(candidate).composed.run
    for path in leaves():
        if not path.startswith(OUTSIDE):
            assert plain(get(composed.run, path)) == plain(get(expected, path)), path


def test_the_experiment_shows_the_options_of_the_candidate():
    searched = space("compile=full", axes=("attention", "dtype"))
    text = experiment_text(
        searched, Candidate((("dtype", "dtype=bfloat16"), ("attention", "attention=math"))), ["found"]
    )
    assert text == (
        "# @package _global_\n# Written by sglang tune\n# found\n"
        "defaults:\n- override /compile: full\n- override /attention: math\ndtype: bfloat16\n"
    )


@pytest.mark.whole
def test_tune_writes_its_results_and_prints_the_command_that_uses_them(sglang, synthetic, composed):
    done = sglang("tune", "--min-psnr", "34", "--axes", "dtype,guidance", "--output-path", "tuned", "--seed", "3")
    assert done.code == 0, done.err
    found = json.loads(Path("tuned/tune.json").read_text())
    assert found["chosen"] == ["dtype=float16"]  # the interval alone breaks the bound
    assert (found["min_psnr"], found["images"], found["budget_s"]) == (34, 16, 1200)
    verdicts = {tuple(each["overrides"]): each["verdict"] for each in found["candidates"]}
    assert verdicts[("dtype=float16",)] == "chosen"
    assert verdicts[("sampling.guidance_interval=[0,0.8]",)] == "below the bound"
    assert verdicts[("dtype=float32",)] == "refused"
    assert {each["pareto"] for each in found["candidates"]} == {True, False}
    command = done.out.rstrip("\n").splitlines()[-1].removeprefix("Use it: ")
    assert command == found["command"]
    assert command.startswith("sglang generate --config-dir tuned/conf experiment=landscape_34db --prompt ")
    run = composed(*shlex.split(command)[2:]).run
    assert (run.dtype.name, run.sampling.guidance_interval, run.sampling.seed) == ("float16", None, 0)


@pytest.mark.whole
def test_a_candidate_is_shown_with_its_ratio_quality_memory_and_verdict(sglang, synthetic):
    done = sglang("tune", "--min-psnr", "34", "--axes", "dtype", "--output-path", "tuned")
    line = next(line for line in done.out.splitlines() if "| dtype=float16 " in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "2", "dtype=float16", "1.65x (1.65 to 1.65)", "44.59", "476.8", "chosen *"
    ]  # fmt: skip


@pytest.mark.whole
def test_ctrl_c_prints_and_writes_the_best_so_far(sglang, synthetic):
    synthetic[1].add(22)
    done = sglang("tune", "--min-psnr", "34", "--axes", "dtype,compile", "--output-path", "tuned")
    assert done.code == 130
    assert done.lines[-1].startswith("ERROR: Interrupted; the best so far: dtype=float16 compile=full")
    assert "dtype=float16 compile=full" in done.out
    assert json.loads(Path("tuned/tune.json").read_text())["chosen"] == ["dtype=float16", "compile=full"]
    assert Path("tuned/conf/experiment/landscape_34db.yaml").is_file()


def test_ctrl_c_before_the_first_measurement_writes_nothing(sglang, synthetic):
    synthetic[1].add(1)
    done = sglang("tune", "--min-psnr", "34", "--axes", "dtype", "--output-path", "tuned")
    assert (done.code, done.lines[-1], done.out) == (130, "ERROR: Interrupted", "")
    assert not Path("tuned/tune.json").exists()


@pytest.mark.whole
def test_if_nothing_keeps_the_bound_the_command_fails_with_its_table(sglang, synthetic):
    done = sglang("tune", "--min-psnr", "70", "--axes", "dtype", "--output-path", "tuned")
    assert done.code == 1
    assert done.lines[-1].startswith("ERROR: No candidate keeps 70 dB: the worst of")
    assert "| base " in done.out
    assert Path("tuned/tune.json").is_file()
    assert not Path("tuned/conf/experiment").exists() or not list(Path("tuned/conf/experiment").iterdir())


def test_a_base_that_cannot_be_measured_is_an_error(sglang, synthetic, monkeypatch):
    def measure(self, candidate, images):
        raise CandidateError(CandidateVerdict.FAILED, "memory ran out")

    monkeypatch.setattr(Machine, "measure", measure)
    done = sglang("tune", "--min-psnr", "34", "--axes", "dtype", "--output-path", "tuned")
    assert (done.code, done.lines[-1]) == (1, "ERROR: The base configuration failed: memory ran out")


@pytest.mark.whole
def test_results_of_another_command_are_not_replaced(sglang, synthetic):
    words = ("tune", "--min-psnr", "34", "--axes", "dtype", "--output-path", "tuned")
    assert sglang(*words).code == 0
    done = sglang(*words)
    assert (done.code, "tuned has the results of another command (tune.json)" in done.lines[-1]) == (2, True)


@pytest.mark.whole
def test_an_experiment_of_the_user_is_not_replaced(sglang, synthetic):
    mine = Path("mine/experiment/fast.yaml")
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ndtype: float32\n")
    words = ("tune", "--min-psnr", "34", "--axes", "dtype", "--config-dir", "mine", "--name")
    done = sglang(*words, "fast")
    assert (done.code, "mine/experiment/fast.yaml exists and was not written by sglang tune" in done.lines[-1]) == (
        2,
        True,
    )
    assert [sglang(*words, "faster", "--output-path", f"tuned{number}").code for number in range(2)] == [0, 0]


@pytest.mark.whole
def test_few_images_are_warned_of(sglang, synthetic):
    done = sglang("tune", "--min-psnr", "34", "--axes", "dtype", "--prompt", "a lake", "--output-path", "tuned")
    assert "WARNING: A bound over 1 image says little about other prompts" in done.err


@pytest.mark.whole
def test_the_baseline_replaces_settings_of_the_request(sglang, synthetic):
    EFFECTS["backend=diffusers"] = (0.9, 90.0)
    done = sglang("tune", "--min-psnr", "34", "--axes", "compile", "--dtype", "bfloat16", "--output-path", "tuned",
                  "--baseline", "backend=diffusers dtype=float32")  # fmt: skip
    assert done.code == 0, done.err
    assert re.search(r"^3\.\d\d times as fast as the baseline backend=diffusers dtype=float32", done.out, re.M)
    searched = space("dtype=bfloat16", axes=("compile",), baseline=("dtype=float32", "backend=diffusers"))
    plan = searched.planned(searched.baseline).plan
    assert (plan.backend, plan.dtype, searched.base_plan.dtype) == ("diffusers", "float32", "bfloat16")


@pytest.mark.slow  # measures, and makes the reference in a process of its own
def test_the_embedded_model_is_tuned_and_the_printed_command_works(sglang, reports):
    Path("two.jsonl").write_text('{"prompt": "a lake at dawn", "seed": 3}\n{"prompt": "dunes", "seed": 4}\n')
    done = sglang("tune", "--min-psnr", "25", "--budget", "60s", "--axes", "dtype", *SMALL,
                  "quality.manifest=two.jsonl", "--output-path", "tuned",
                  "--baseline", "backend=diffusers")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(Path("tuned/tune.json").read_text())
    measured = [each for each in found["candidates"] if each["images"] == 2]
    assert len(measured) >= 2  # the base and the baseline; more candidates if nothing else runs
    assert found["against_baseline"]["speed_up"] > 0
    chosen = next(each for each in measured if each["verdict"] == "chosen")
    assert chosen["identical"] or chosen["psnr"] >= 25
    again = sglang(*shlex.split(done.out.rstrip("\n").splitlines()[-1].removeprefix("Use it: "))[1:])
    assert again.code == 0, again.err
    record = json.loads(Path("outputs/generated_image_0.json").read_text())
    for word in chosen["overrides"]:
        path, _, value = word.partition("=")
        if path in ("dtype", "attention"):
            assert record["effective"][path] == value
    page = html.unescape(Path("tuned/report.html").read_text())
    assert all(word in page for word in (">base<", "baseline backend=diffusers", "Trade-offs", found["conclusion"][0]))
