"""perf.trace: a profiler trace of one batch after the timed generations, with stages, steps and blocks by name."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SMALL = ("--prompt", "a", "--seed", "1", "--height", "32", "--width", "32", "--num-inference-steps", "2", "perf=light")
STAGES = ["text_encoding", "latents", "denoising", "decoding"]
BLOCKS = {
    ("flux", "sglang"): ["blocks.0", "blocks.1", "single_blocks.0", "single_blocks.1"],
    ("flux", "diffusers"): [
        "transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1",
    ],
    ("sd3", "sglang"): ["blocks.0", "blocks.1", "blocks.2"],
    ("sd3", "diffusers"): ["transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2"],
}  # fmt: skip


def events(path: str | Path) -> list[dict]:
    """The complete events of a trace, with what Perfetto needs of each."""
    content = json.loads(gzip.decompress(Path(path).read_bytes()))
    found = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert all({"ph", "ts", "dur", "pid", "tid", "name"} <= event.keys() for event in found)
    return found


def ranges(path: str | Path) -> list[dict]:
    """The named ranges in the order of their beginning, without the markers of the profiler and the compiler."""
    named = [event for event in events(path) if event.get("cat") == "user_annotation"]
    return sorted(named, key=lambda event: (event["ts"], -event["dur"]))


def inside(outer: dict, found: list[dict]) -> list[str]:
    """The names of the ranges within `outer`."""
    end = outer["ts"] + outer["dur"]
    return [
        event["name"]
        for event in found
        if event is not outer and outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= end
    ]


def one(found: list[dict], name: str) -> dict:
    (event,) = (event for event in found if event["name"] == name)
    return event


@pytest.fixture
def run(sglang, pipelines) -> Callable[..., list[str]]:
    def run(name: str, *words: str) -> list[str]:
        done = sglang("generate", "--model-path", pipelines[name], *SMALL, "perf.trace=true", *words)
        assert done.code == 0, done.err
        return done.lines

    return run


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "backend"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] == "sd3" else ()) for case in BLOCKS],
)
def test_blocks_lie_in_steps_and_steps_in_the_denoising_stage(run, name, backend):
    lines = run(name, "--backend", backend, "--guidance-scale", "1")
    assert "INFO: Profiler trace saved to: outputs/trace.json.gz (open it in https://ui.perfetto.dev)" in lines
    found = ranges("outputs/trace.json.gz")
    assert [event["name"] for event in found if event["name"] in STAGES] == STAGES
    denoising = inside(one(found, "denoising"), found)
    assert [each for each in denoising if each.startswith("step ")] == ["step 0", "step 1"]
    for step in ("step 0", "step 1"):
        assert inside(one(found, step), found) == BLOCKS[name, backend]
    operators = [event["name"] for event in events("outputs/trace.json.gz") if event.get("cat") == "cpu_op"]
    assert "aten::addmm" in operators or "aten::linear" in operators


@pytest.mark.whole
@pytest.mark.parametrize("backend", [pytest.param("sglang", marks=pytest.mark.slow), "diffusers"])
def test_the_levels_and_blocks_of_a_unet_have_their_names(run, backend):
    run("sdxl", "--backend", backend)
    names = {event["name"] for event in ranges("outputs/trace.json.gz")}
    if backend == "sglang":
        assert {"down.0.residuals.0", "middle.residuals.0", "up.0.residuals.0"} <= names
    else:
        own = {"down_blocks.0", "mid_block", "up_blocks.0", "down_blocks.1.attentions.0.transformer_blocks.0"}
        assert own <= names


@pytest.mark.whole
def test_the_trace_is_of_one_batch_after_the_timed_generations(run):
    lines = run("sd3", "--num-samples", "3", "sampling.batch_size=2", "perf.repeat=2", "--perf-dump-path", "perf.json")
    dump = json.loads(Path("perf.json").read_text())
    assert [len(repeat["denoise_steps_ms"]) for repeat in dump["repeats"]] == [4, 4]
    assert (dump["trace"], dump["ranks"][0]["trace"]) == ("trace.json.gz", "trace.json.gz")
    found = ranges("outputs/trace.json.gz")
    assert [event["name"] for event in found if event["name"] in STAGES] == STAGES
    assert len(list(Path("outputs").glob("*.png"))) == 3
    assert lines.index("INFO: Generating a batch once more for the profiler trace") > max(
        index for index, line in enumerate(lines) if "Generated image saved" in line
    )


def test_without_the_setting_there_is_no_trace(sglang, pipelines):
    done = sglang("generate", "--model-path", pipelines["sd3"], *SMALL, "--perf-dump-path", "perf.json")
    assert done.code == 0, done.err
    assert json.loads(Path("perf.json").read_text())["trace"] is None
    assert not list(Path("outputs").glob("*.gz"))


@pytest.mark.whole
def test_a_trace_of_the_embedded_model_is_small_and_replaces_an_older_one(sglang):
    Path("outputs").mkdir()
    Path("outputs/trace.json.gz").write_bytes(gzip.compress(b'{"schemaVersion": 1, "traceEvents": []}'))
    done = sglang("generate", "--prompt", "a lake", "--num-inference-steps", "3", "--seed", "1", "perf.trace=true")
    assert done.code == 0, done.err
    assert sorted(path.suffix for path in Path("outputs").iterdir()) == [".gz", ".json", ".png"]
    size = Path("outputs/trace.json.gz").stat().st_size
    assert 10_000 < size < 500_000  # three steps of seven blocks, and an autoencoder


@pytest.mark.slow
def test_each_rank_writes_a_trace_of_its_own(run_on_ranks):
    done = run_on_ranks("flux", "parallel=tp2", "perf.trace=true", "--perf-dump-path", "perf.json")
    assert done.code == 0, done.err
    names = ["trace.json.gz", "trace.rank1.json.gz"]
    assert [rank["trace"] for rank in json.loads(Path("perf.json").read_text())["ranks"]] == names
    for name in names:
        found = ranges(Path("outputs") / name)
        assert "blocks.0" in inside(one(found, "step 1"), found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_blocks_that_are_compiled_one_by_one_keep_their_names(run, traced, monkeypatch, backend, mode):
    graphs, original = [], torch.compile

    def collect(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    if backend == "diffusers":  # `traced` replaces the compiler of the native engine
        monkeypatch.setattr(torch, "compile", lambda function, **_: original(function, backend=collect))
    run("flux", "--backend", backend, f"compile={mode}", "--guidance-scale", "1")
    expected = {("regional", "sglang"): 2, ("regional", "diffusers"): 3}.get((mode, backend), 1)
    assert len(graphs if backend == "diffusers" else traced) == expected  # as many as without a trace
    found = ranges("outputs/trace.json.gz")
    own = [name for name in inside(one(found, "step 1"), found) if name in BLOCKS["flux", backend]]
    assert own == (BLOCKS["flux", backend] if mode == "regional" else [])


@pytest.mark.slow
def test_each_job_of_a_sweep_has_its_own_trace(sglang, pipelines):
    words = ("-m", "--model-path", pipelines["sd3"], *SMALL, "perf.trace=true", "sampling.guidance_scale=1,3")
    done = sglang("generate", *words, "hydra.sweep.dir=sweep")
    assert done.code == 0, done.err
    for job in ("0", "1"):
        assert [event["name"] for event in ranges(f"sweep/{job}/trace.json.gz") if event["name"] in STAGES] == STAGES


def test_a_trace_without_block_names_is_announced(sglang, pipelines):
    words = ("--model-path", pipelines["sd3"], *SMALL, "perf.trace=true", "dry_run=true")
    lines = sglang("generate", *words, "compile=full").lines
    assert [line for line in lines if "perf.trace" in line] == [
        "WARNING: perf.trace: the trace has no names of blocks, since compile=full compiles all of them at once; run "
        "with compile=none or compile=regional to see them"
    ]
    for mode in ("none", "regional"):
        done = sglang("generate", *words, f"compile={mode}")
        assert (done.code, "trace" in done.err) == (0, False)
    assert not Path("outputs").exists()


def occupy_by_text() -> None:
    Path("outputs/trace.json.gz").write_text("mine")


def occupy_by_other_gzip() -> None:
    Path("outputs/trace.json.gz").write_bytes(gzip.compress(b'{"mine": 1}'))


def occupy_by_folder() -> None:
    Path("outputs/trace.json.gz").mkdir()


def occupy_second_rank() -> None:
    Path("outputs/trace.rank1.json.gz").write_text("mine")


@pytest.mark.parametrize("dry", ["true", "false"])
@pytest.mark.parametrize(
    ("occupy", "words", "sentence"),
    [
        (occupy_by_text, (), "perf.trace writes outputs/trace.json.gz, and the file of that name is not a profiler"),
        (occupy_by_other_gzip, (), "is not a profiler trace and would be lost; move it away or change --output-path"),
        (occupy_by_folder, (), "outputs/trace.json.gz cannot be written: "),
        (occupy_second_rank, ("parallel=tp2",), "perf.trace writes outputs/trace.rank1.json.gz"),
    ],
)
def test_a_file_in_the_place_of_the_trace_is_refused(sglang, pipelines, occupy, words, sentence, dry):
    Path("outputs").mkdir()
    occupy()
    done = sglang("generate", "--model-path", pipelines["sd3"], *SMALL, "perf.trace=true", f"dry_run={dry}", *words)
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err
    assert len(list(Path("outputs").iterdir())) == 1


def test_a_dump_cannot_take_the_name_of_a_trace(sglang, pipelines):
    words = ("--model-path", pipelines["sd3"], *SMALL, "dry_run=true")
    done = sglang("generate", *words, "--perf-dump-path", "outputs/trace.json.gz")
    assert (done.code, "names such as trace.json.gz are those of other results" in done.lines[-1]) == (2, True)


@pytest.mark.whole
def test_a_repeated_record_does_not_trace_again(run, sglang):
    run("sd3")
    Path("outputs/trace.json.gz").unlink()
    done = sglang("generate", "--config", "outputs/generated_image_0.json")
    assert done.code == 0, done.err
    assert Path("outputs/generated_image_1.png").exists()
    assert not Path("outputs/trace.json.gz").exists()
