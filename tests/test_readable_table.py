"""The table of a sweep for readers: its width, what stands above, in and below it, and the speed-up of each job."""

import cProfile
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sglang_gen import files, log
from sglang_gen.errors import RunError
from sglang_gen.perf.dump_numbers import Measure, measure, peak_memory, speed_up, times
from sglang_gen.report.job_reader import Row, read_jobs
from sglang_gen.sweep import table
from sglang_gen.sweep.callback import SweepTable
from sglang_gen.sweep.columns import width
from sglang_gen.sweep.markdown import digits, ranges, to_markdown
from sglang_gen.sweep.table import to_csv

FACTS = {"model": "landscape", "work": "1 image of 128 x 128 in 28 steps", "prompt": "a lake", "backend": "sglang",
         "machine": "EPYC, 2 cores, 1 thread a rank"}  # fmt: skip
SETTINGS = {"attention": "auto", "dtype": "auto", "backend": "sglang", "cache": "none"}
EFFECTIVE = SETTINGS | {"attention": "sdpa", "dtype": "bfloat16"}
QUALITY = {"psnr": 41.234, "ssim": 0.98765, "max_error": 12}


def row(job: int, *overrides: str, step: float = 0.02, mean: float | None = None, **changes: object) -> Row:
    def measured(value: float) -> Measure:
        return measure([value, value * 1.01, value * 0.98])

    whole = {
        "status": "completed",
        "overrides": overrides,
        "times": {"step": measured(step), "step_mean": measured(mean or step), "total": measured(30 * step)},
        "memory": {"peak_host_mb": 326.44},
        "requested": SETTINGS,
        "effective": EFFECTIVE,
        "facts": FACTS,
        **changes,
    }
    return Row(str(job), **whole)


def failed(job: int, *overrides: str, error: str = "out of memory", status: str = "failed") -> Row:
    return Row(str(job), status, overrides, error)


def lines(*rows: Row, limit: int = 120) -> list[str]:
    return to_markdown(rows, "Sweep x", limit).splitlines()


def cells(*rows: Row, limit: int = 120) -> list[list[str]]:
    """The cells of the table, the header first."""
    found = [line for line in lines(*rows, limit=limit) if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in (found[0], *found[2:])]


LETTERS = "ab c|`*[]<\\_…→湖é\u0301\n\t\x1b\u202e🐈"
KEYS = ("attention", "dtype", "cache.residual_diff_threshold", "sampling.prompt", "model.path", "a.prompt", "parallel",
        "backend.diffusers_kwargs.x", "sampling.num_inference_steps", "quant", "compile", "seed")  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_no_line_is_wider_than_its_limit_whatever_is_swept(seed):
    generator = random.Random(seed)

    def words() -> str:
        return "".join(generator.choices(LETTERS, k=generator.choice((0, 3, 9, 80, 300))))

    def overrides() -> list[str]:
        return [f"{key}={words()}" for key in generator.sample(KEYS, generator.randrange(len(KEYS)))]

    limit, facts = generator.choice((40, 59, 80, 120, 201)), FACTS | {"prompt": words()}
    rows = [row(number, *overrides(), quality=QUALITY, facts=facts) for number in range(generator.randrange(4))]
    rows += [failed(len(rows), *overrides(), error=f"no {words()}")]
    found = lines(*rows, limit=limit)
    assert max(map(width, found)) <= limit
    shown = [line for line in found if line.startswith("|")]
    assert len(shown) == len(rows) + 2
    assert len({width(line) for line in shown}) == 1


def test_wide_letters_count_twice_and_an_escaped_bar_is_not_cut_from_its_backslash():
    rows = [row(0, "sampling.prompt=" + "湖の夕暮れ" * 30), row(1, "sampling.prompt=" + "|" * 100)]
    for limit in range(60, 90):
        found = [line for line in lines(*rows, limit=limit) if line.startswith("|")]
        assert {width(line) for line in found} <= set(range(limit + 1))
        assert len({line.replace("\\|", "").count("|") for line in found}) == 1


def test_a_wider_table_has_the_columns_of_a_narrower_one_and_more():
    rows = [row(number, f"attention={name}", f"cache.residual_diff_threshold={number}", quality=QUALITY)
            for number, name in enumerate(("auto", "math", "sage"))]  # fmt: skip
    before: set[str] = set()
    for limit in (40, 60, 80, 100, 120, 140, 200):
        header = {name for name in cells(*rows, limit=limit)[0] if "…" not in name}
        assert {name for name in before if "…" not in name} <= header
        before = header
    assert before == {"job", "attention", "residual_diff_threshold", "step (ms)", "speed-up", "total (ms)",
                      "memory (MiB)", "PSNR (dB)", "SSIM", "max error"}  # fmt: skip
    assert {"job", "step (ms)"} <= set(cells(*rows, limit=40)[0])


def test_columns_that_do_not_fit_are_named_below():
    rows = [row(number, f"attention={number}", quality=QUALITY) for number in range(2)]
    (line,) = [line for line in lines(*rows, limit=80) if line.startswith("Only in table.csv: ")]
    assert line.startswith("Only in table.csv: max error, SSIM, total, ")
    assert lines(*rows, limit=200)[-1].startswith("Only in table.csv: each stage, ")


def test_values_that_differ_in_their_middle_keep_it():
    paths = [f"model.path=/a/very/long/path/to/folder/number/{number}/of/stable-diffusion" for number in range(3)]
    header, *found = cells(*(row(number, path) for number, path in enumerate(paths)), limit=60)
    assert header[1] == "path"
    assert [cell[1] for cell in found] == ["…0…", "…1…", "…2…"]


def test_what_ran_stands_once_above_the_table_and_names_the_jobs_where_it_differs():
    other = FACTS | {"model": "sdxl (random weights)"}
    found = lines(row(0, "x=1"), row(1, "x=2"), row(2, "x=3", facts=other), failed(3, "x=4"))
    assert found[2:9] == [
        "3 of 4 jobs completed.",
        "",
        "- Model: landscape (jobs 0, 1); sdxl (random weights) (jobs 2)",
        "- Work: 1 image of 128 x 128 in 28 steps",
        "- Prompt: a lake",
        "- Backend: sglang",
        "- Machine: EPYC, 2 cores, 1 thread a rank",
    ]


def test_a_value_that_did_not_take_effect_has_an_arrow_in_its_row_or_once_above():
    rows = [row(0, "attention=auto"), row(1, "attention=math", requested=SETTINGS | {"attention": "math"},
                                          effective=EFFECTIVE | {"attention": "math"})]  # fmt: skip
    header, *found = cells(*rows)
    assert [cell[header.index("attention")] for cell in found] == ["auto → sdpa", "math"]
    assert "- In effect: dtype auto → bfloat16" in lines(*rows)
    mixed = lines(row(0, "x=1"), row(1, "x=2", effective=EFFECTIVE | {"dtype": "float32"}), row(2, "x=3"))
    assert (
        "- In effect: attention auto → sdpa, dtype auto → bfloat16 (jobs 0, 2), dtype auto → float32 (jobs 1)" in mixed
    )
    chosen = row(0, "x=1", requested=SETTINGS | {"backend": "auto"})
    assert "- Backend: auto → sglang" in lines(chosen)


def test_a_layout_is_shown_where_its_option_does_not_name_it():
    def on(job: int, override: str, **degrees: int) -> Row:
        whole = {f"parallel.{axis}": str(degrees.get(axis, 1)) for axis in ("dp", "cfg", "ring", "ulysses", "tp")}
        return row(job, override, effective=EFFECTIVE | whole)

    rows = [on(0, "parallel=single"), on(1, "parallel=tp2", tp=2), on(2, "parallel=sp2_tp2", ring=2, tp=2)]
    assert [cell[1] for cell in cells(*rows)] == ["parallel", "single", "tp2", "sp2_tp2 → ring2 tp2"]
    keys = [on(0, "parallel.num_gpus=1"), on(1, "parallel.num_gpus=2", ulysses=2)]
    assert "- Layout: single (jobs 0); ulysses2 (jobs 1)" in lines(*keys)


def test_a_job_that_did_not_complete_has_its_reason_below_the_table():
    rows = [
        row(0, "x=1"),
        failed(1, "x=2"),
        failed(2, "x=3", status="refused", error="x is 3 | not 1"),
        failed(3, "x=4"),
    ]
    header, *found = cells(*rows)
    assert [cell[header.index("step (ms)")].split(" ")[0] for cell in found] == ["20.00", "failed", "refused", "failed"]
    assert [line for line in lines(*rows) if line.startswith("- ")][-2:] == [
        "- 1, 3: out of memory",
        "- 2: x is 3 | not 1",
    ]
    assert cells(failed(0, "x=1"), failed(1, "x=2"))[1:] == [["0", "1", "failed"], ["1", "2", "failed"]]


def test_kept_and_reused_jobs_are_marked(tmp_path):
    for name, note in {"0": {"kept": True}, "1": {"reused": True}, "2": {"kept": False}, "10": {}}.items():
        (tmp_path / name).mkdir()
        whole = {"overrides": [f"x={name}"], "status": "completed", "files": [], **note}
        (tmp_path / name / "job.json").write_text(json.dumps(whole))
    rows = read_jobs(tmp_path)
    assert [cell[0] for cell in cells(*rows)] == ["job", "0 k", "1 r", "2", "10"]
    text = to_markdown(rows)
    assert "- k: kept from an earlier run of this sweep\n- r: took the weights of an earlier job\n" in text
    marked = [line.split(",")[-5:-3] for line in to_csv(rows).splitlines()]
    assert marked == [["kept", "reused"], ["true", ""], ["", "true"], ["", ""], ["", ""]]


def test_the_speed_up_is_that_of_the_medians_against_the_first_job_that_completed():
    rows = [failed(0, "x=0"), row(1, "x=1", step=0.02), row(2, "x=2", step=0.005)]
    header, *found = cells(*rows)
    assert [cell[header.index("speed-up")].split(" ")[0] for cell in found] == ["", "1.00x", "4.00x"]
    assert "Speed-up: step time of job 1 / that of the job." in " ".join(lines(*rows))
    assert "speed-up" not in cells(row(0, "x=1"))[0]


def test_the_speed_up_of_a_cache_is_that_of_the_mean_step():
    """With more than half of the steps reused, the median is that of a reused step."""
    cached = row(1, "cache=scm", step=0.004, mean=0.01, effective=EFFECTIVE | {"cache": "dbcache"})
    rows = [row(0, "cache=none"), cached]
    header, *found = cells(*rows)
    assert [cell[header.index("speed-up")].split(" ")[0] for cell in found] == ["1.00x", "2.00x"]
    assert found[1][header.index("mean step (ms)")].startswith("10.00 ±")
    line = next(line for line in to_csv(rows).splitlines() if line.startswith("1,"))
    assert {"5.0", "2.0"} <= set(line.split(","))  # both ratios
    assert "mean step (ms)" not in cells(row(0, "x=1"), row(1, "x=2"))[0]
    assert "mean step (ms)" in cells(row(0, "x=1"), row(1, "x=2", mean=0.03))[0]  # the steps differ by themselves


def test_the_mean_step_is_that_of_all_steps_of_a_generation():
    steps = [{"step": number, "duration_ms": value} for number, value in enumerate((10.0, 1.0, 1.0))]
    found = times({"denoise_steps_ms": steps, "steps": []})
    assert (found["step"].median, found["step_mean"].median) == (pytest.approx(0.001), pytest.approx(0.004))


@pytest.mark.parametrize(("left", "right"), [(3, 3), (5, 2), (10, 4)])
def test_the_interval_of_a_speed_up_holds_the_true_ratio_as_often_as_it_says(left, right):
    generator, trials, held = random.Random(5), 400, 0
    for _ in range(trials):
        base = measure([generator.gauss(1.0, 0.03) for _ in range(left)])
        new = measure([generator.gauss(0.5, 0.01) for _ in range(right)])
        found = speed_up(base, new)
        assert found.low <= found.median <= found.high
        held += found.low <= 2 <= found.high
    assert 0.92 <= held / trials <= 1


def test_a_speed_up_of_single_times_has_no_interval():
    assert speed_up(measure([3.0]), measure([1.0, 1.1])) == Measure(pytest.approx(3 / 1.05))
    assert speed_up(measure([1.0, 1.0]), measure([2.0, 2.0])) == Measure(0.5, 0.5, 0.5, 2)
    assert speed_up(measure([1.0]), measure([0.0])).median == math.inf


def test_memory_is_that_of_the_rank_with_most():
    ranks = [
        {"rank": 0, "peak_host_anon_mb": 300.0},
        {"rank": 1, "peak_host_anon_mb": 500.0, "peak_allocated_mb": None},
    ]
    points = {"load": {"peak_host_anon_mb": 310.0, "peak_allocated_mb": 20.0}}
    assert peak_memory({"memory_checkpoints": points, "ranks": ranks}) == {
        "peak_host_mb": 500.0,
        "peak_device_mb": 20.0,
    }
    gpu = [row(number, f"x={number}", memory={"peak_device_mb": 20480.0, "peak_host_mb": 900.0}) for number in range(2)]
    header, first, _ = cells(*gpu)
    assert dict(zip(header, first, strict=True)).items() >= {"device (GiB)": "20.00", "host (MiB)": "900.0"}.items()


@given(st.floats(1e-5, 1e9))
def test_a_number_has_four_significant_digits(value):
    text = digits(value)
    assert float(text) == pytest.approx(value, rel=6e-4)
    assert "e" not in text
    significant = text.replace(".", "").lstrip("0")
    assert len(significant) == 4 or (len(significant) > 4 and "." not in text)


def test_jobs_are_named_by_their_ranges():
    assert ranges(["3", "0", "1", "2", "7", "8", "x"]) == "0-3, 7, 8, x"
    assert ranges([str(2 * number) for number in range(100)]).endswith("18, 20, 22 and others")


def test_the_work_for_each_job_does_not_grow_with_the_number_of_jobs():
    def calls(count: int) -> int:
        rows = [
            row(number, f"seed={number}", f"prompt=a lake {number}", "a=b", quality=QUALITY) for number in range(count)
        ]
        profile = cProfile.Profile()
        profile.runcall(lambda: to_markdown(rows) + to_csv(rows))
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(200) < 10 * calls(25)


def test_the_printed_table_is_as_wide_as_the_terminal(tmp_path, capsys, monkeypatch):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        step = {"total_duration_ms": 60.0, "steps": [], "denoise_steps_ms": [{"step": 0, "duration_ms": 50.0}] * 3}
        note = {"overrides": [f"sampling.num_inference_steps={name}"], "status": "completed", "files": ["a.png"]}
        (tmp_path / name / "job.json").write_text(json.dumps(note))
        (tmp_path / name / "perf.json").write_text(json.dumps(step))
    table.print_table(tmp_path)
    assert capsys.readouterr().out == to_markdown(read_jobs(tmp_path), f"Sweep {tmp_path.name}")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns in (60, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        table.print_table(tmp_path)
        assert capsys.readouterr().out == to_markdown(read_jobs(tmp_path), f"Sweep {tmp_path.name}", columns)


@pytest.mark.parametrize(("error", "logged"), [(BrokenPipeError(), 0), (RunError("The result cannot be written"), 1)])
def test_a_table_that_cannot_be_printed_is_one_line_or_none_if_nobody_reads(tmp_path, monkeypatch, error, logged):
    def fail(_text: str) -> None:
        raise error

    lines: list[str] = []
    monkeypatch.setattr(files, "print_result", fail)
    monkeypatch.setattr(log, "error", lines.append)
    (tmp_path / "0").mkdir()
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert len(lines) == logged
    assert (tmp_path / "table.md").exists()


def test_a_sweep_that_was_interrupted_before_its_first_job_has_no_table_and_says_nothing_of_it(tmp_path, monkeypatch):
    lines: list[str] = []
    for level in ("info", "error"):
        monkeypatch.setattr(log, level, lines.append)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert (lines, list(tmp_path.iterdir())) == ([], [])


def test_an_interrupted_sweep_has_a_table_and_prints_none(tmp_path, capsys):
    (tmp_path / "0").mkdir()
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        SweepTable().on_multirun_end(config)
    assert (capsys.readouterr().out, (tmp_path / "table.csv").exists()) == ("", True)
    try:
        raise RunError("Job 0 failed")  # of an optimizing sweeper
    except RunError:
        SweepTable().on_multirun_end(config)
    assert capsys.readouterr().out.startswith("# Sweep ")
