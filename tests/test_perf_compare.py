"""`sglang perf compare`: dumps of both kinds are read, paired and judged; the exit code and the reports say how."""

import copy
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from dumps import STAGES, times

from sglang_gen.errors import UserError
from sglang_gen.perf import command
from sglang_gen.perf.compare import Rules, compare
from sglang_gen.perf.dump_reader import collect, read
from sglang_gen.perf.statistics import Verdict

FIELDS = {"steps": 4, "dtype": "float32", "parallel": {"tp": 1, "ring": 1}, "versions": {"torch": "2.13.0"}}


def ours(factor: float = 1.0, hash_: str = "aaaa", fields: dict | None = None, peak: float = 1000.0) -> dict:
    return {
        "schema_version": 1,
        **times(factor),
        "memory_checkpoints": {
            "load": {"peak_allocated_mb": None, "peak_reserved_mb": None, "peak_host_anon_mb": peak / 2},
            "denoising": {"peak_allocated_mb": None, "peak_reserved_mb": None, "peak_host_anon_mb": peak},
            "decoding": {"peak_allocated_mb": None, "peak_reserved_mb": None, "peak_host_anon_mb": 0.75 * peak},
        },
        "meta": {"prompt": "a lake", "model": "landscape"},
        "samples": [{"seed": 1}, {"seed": 2}],
        "fingerprint": {"hash": hash_, "fields": copy.deepcopy(fields or FIELDS)},
    }


def upstreams(factor: float = 1.0, model: str = "FLUX.1-dev", steps: int = 4) -> dict:
    stages = {"TextEncodingStage": 300.0, "DenoisingStage": 8000.0}
    memory = {"allocated_mb": 1.0, "reserved_mb": 2.0, "peak_allocated_mb": 900.0, "peak_reserved_mb": 1200.0}
    return {
        "timestamp": "2026-01-01T00:00:00+00:00", "request_id": "r", "commit_hash": "c", "tag": "benchmark_dump",
        **times(factor, stages),
        "denoise_steps_ms": [{"step": step, "duration_ms": 8000.0 * factor / steps} for step in range(steps)],
        "memory_checkpoints": {"after_DenoisingStage": memory},
        "meta": {"prompt": "a lake", "model": model},
    }  # fmt: skip


def save(path: str | Path, content: object) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def perf(*argv: str) -> tuple[int, dict]:
    """Exit code and JSON report of `sglang perf compare ARGV...`."""
    code = command.main(["compare", *argv, "--json", "report.json"])
    return code, json.loads(Path("report.json").read_text(encoding="utf-8"))


def rows(report: dict) -> dict[str, dict]:
    return {row["metric"]: row for row in report["comparisons"][0]["rows"]}


@pytest.mark.whole
def test_a_dump_of_a_real_run_passes_against_its_equal(pipelines, sglang, capsys):
    small = ("--height", "32", "--width", "32", "--num-inference-steps", "2", "perf.machine_rates=false")
    done = sglang(
        "generate", "--model-path", pipelines["sd3"], "--prompt", "a", *small, "--perf-dump-path", "perf.json"
    )
    assert done.code == 0, done.err
    other = {**json.loads(Path("perf.json").read_text()), "request_id": "another run"}
    code, report = perf("perf.json", save("other.json", other))
    assert (code, report["verdict"], report["exit_code"]) == (0, "PASS", 0)
    assert {"total", "stage.load", "stage.denoising", "stage.decoding", "stage.saving", "step"} <= set(rows(report))
    assert all(row["ratio"] == 1 and row["interval"] is None for row in rows(report).values())
    assert "one observation on each side" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "factor", "code", "verdict"),
    [
        ((), 1.0, 0, "PASS"), ((), 1.015, 0, "PASS"), ((), 1.05, 3, "TOO_NOISY"), ((), 0.9, 0, "PASS"),
        (("--single",), 1.015, 0, "PASS"), (("--single",), 1.05, 1, "REGRESSION"),
        (("--single",), 0.9, 0, "IMPROVEMENT"),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_verdicts(options, factor, code, verdict):
    found, report = perf(save("base.json", ours()), save("new.json", ours(factor)), *options)
    assert (found, report["verdict"]) == (code, verdict)
    assert rows(report)["total"]["ratio"] == pytest.approx(factor)
    assert rows(report)["step"]["verdict"] == verdict


def test_a_stage_counts_only_beyond_its_share_and_its_milliseconds():
    base, new = ours(), ours()
    for entry in new["steps"]:
        entry["duration_ms"] += {"saving": 110.0, "decoding": 140.0, "denoising": 700.0, "text_encoding": 125.0}.get(
            entry["name"], 0.0
        )
    code, report = perf(save("base.json", base), save("new.json", new), "--single")
    assert code == 1
    found = {name: row["verdict"] for name, row in rows(report).items() if name.startswith("stage.")}
    assert found.pop("stage.text_encoding") == "REGRESSION"  # by 125 ms, 42 %
    assert set(found.values()) == {"PASS"}  # 110 ms of 20, 140 of 1500 (9.3 %), 700 of 8000 (8.75 %)
    assert rows(report)["stage.saving"]["tolerance"] == pytest.approx(120 / 20)


def test_memory_counts_by_its_highest_peak():
    code, report = perf(save("base.json", ours()), save("new.json", ours(peak=1030.0)), "--single")
    assert code == 1
    row = rows(report)["memory.peak_host_anon"]
    assert (row["base"]["observations"], row["new"]["observations"], row["unit"]) == ([1000.0], [1030.0], "MB")
    assert [name for name in rows(report) if name.startswith("memory")] == ["memory.peak_host_anon"]


def test_every_repeat_is_an_observation_and_loading_is_one_per_dump():
    def repeated(factor):
        stages = {name: value for name, value in STAGES.items() if name != "load"}
        factors = [factor * (1 + shift) for shift in (-0.004, 0.0, 0.003, 0.001)]
        return {**ours(), "repeats": [times(item, stages) for item in factors]}

    code, report = perf(save("base.json", repeated(1.0)), save("new.json", repeated(1.05)))
    assert code == 1
    assert len(rows(report)["total"]["base"]["observations"]) == 4
    assert len(rows(report)["stage.load"]["base"]["observations"]) == 1
    low, high = rows(report)["total"]["interval"]
    assert 1.02 < low < 1.05 < high
    rate = report["comparisons"][0]["images_per_second"]
    assert rate["base"] == pytest.approx(2 / 9.82, rel=0.001)
    assert rate["new"] == pytest.approx(rate["base"] / 1.05)


def test_steps_of_a_repeat_may_be_plain_numbers():
    plain = {**ours(), "repeats": [{**times(), "denoise_steps_ms": [1.0, 5.0, 2.0]}]}
    assert read(Path(save("plain.json", plain))).metrics["step"] == [2.0]


def test_files_of_one_fingerprint_are_repeats_whatever_folder_holds_them():
    for number, shift in enumerate((0.0, 0.003, -0.002)):
        save(f"base/{number}/perf.json", ours(1 + shift))
        save(f"new/deep/{number}/perf.json", ours(1.1 + shift))
    save("base/report.json", {"verdict": "PASS"})
    save("base/list.json", [1, 2])
    save("base/.tmp-1.json", "half")
    code, report = perf("base", "new/deep/0", "new", "new/deep/1/perf.json")
    assert code == 1
    assert len(rows(report)["total"]["base"]["observations"]) == 3
    assert len(rows(report)["total"]["new"]["observations"]) == 3  # a file that is named twice counts once


def test_too_noisy_says_how_many_repeats_decide(capsys):
    for number, factor in enumerate((0.9, 1.0, 1.12)):
        save(f"base/{number}.json", ours(factor))
        save(f"new/{number}.json", ours(factor * 1.01))
    code, report = perf("base", "new")
    assert (code, report["verdict"]) == (3, "TOO_NOISY")
    needed = rows(report)["total"]["repeats_needed"]
    assert needed > 3
    assert f"TOO_NOISY, {needed} repeats needed" in capsys.readouterr().out


def test_another_recipe_is_a_mismatch_that_lists_the_fields_with_both_values(capsys):
    fields = {**FIELDS, "dtype": "bfloat16", "parallel": {"tp": 2, "ring": 1}}
    save("base/far.json", ours(hash_="cccc", fields={**FIELDS, "steps": 99, "versions": {"torch": "1"}, "x": 1}))
    save("base/near.json", ours())
    code, report = perf("base", save("new.json", ours(hash_="bbbb", fields=fields)))
    assert (code, report["verdict"]) == (3, "RECIPE_MISMATCH")
    (found,) = report["comparisons"]
    assert found["differences"] == [
        {"field": "dtype", "base": "float32", "new": "bfloat16"},
        {"field": "parallel.tp", "base": 1, "new": 2},
    ]
    assert found["base_files"] == ["base/near.json"]
    assert "| parallel.tp | 1 | 2 |" in capsys.readouterr().out


def test_a_regression_outweighs_a_mismatch_and_both_are_reported():
    save("base/a.json", ours())
    save("base/left.json", ours(hash_="dddd", fields={**FIELDS, "steps": 8}))
    save("new/a.json", ours(1.2))
    save("new/b.json", ours(hash_="bbbb", fields={**FIELDS, "steps": 5}))
    code, report = perf("base", "new", "--single")
    assert code == 1
    assert [item["verdict"] for item in report["comparisons"]] == ["REGRESSION", "RECIPE_MISMATCH"]
    assert report["base_without_new"] == ["base/left.json"]


def test_upstreams_dumps_are_paired_by_model_and_prompt():
    code, report = perf(save("base.json", upstreams()), save("new.json", upstreams(1.05)), "--single")
    assert code == 1
    assert set(rows(report)) == {
        "total", "stage.TextEncodingStage", "stage.DenoisingStage", "step",
        "memory.peak_allocated", "memory.peak_reserved",
    }  # fmt: skip
    assert rows(report)["stage.DenoisingStage"]["verdict"] == "PASS"  # 5 % of a stage is within 10 %
    assert report["comparisons"][0]["images_per_second"] == {"base": None, "new": None}
    assert "no fingerprint" in report["comparisons"][0]["notes"][0]


@pytest.mark.parametrize(
    ("other", "field"), [(upstreams(model="SDXL"), "model"), (upstreams(steps=8), "denoising_steps")]
)
def test_upstreams_dumps_of_another_model_or_length_are_a_mismatch(other, field):
    code, report = perf(save("base.json", upstreams()), save("new.json", other))
    assert code == 3
    assert [item["field"] for item in report["comparisons"][0]["differences"]] == [field]


def test_our_dump_is_held_against_upstreams_of_the_same_model_and_prompt():
    other = upstreams(model="landscape")
    code, report = perf(save("base.json", other), save("new.json", ours(0.5)))
    assert code == 0
    assert set(rows(report)) == {"total", "step"}
    assert report["comparisons"][0]["only_in"]["base"][0] == "stage.TextEncodingStage"
    save("two/a.json", ours())
    save("two/b.json", ours(hash_="bbbb", fields={**FIELDS, "dtype": "bfloat16"}))
    with pytest.raises(UserError, match=r"fits several recipes of the base.*name one: two/a.json, two/b.json"):
        perf("two", "base.json")


def test_old_dumps_without_newer_fields_stay_readable():
    old = {
        key: value for key, value in ours().items() if key not in ("samples", "memory_checkpoints", "denoise_steps_ms")
    }
    code, report = perf(save("base.json", old), save("new.json", ours()))
    assert code == 0
    assert report["comparisons"][0]["only_in"] == {"base": [], "new": ["step", "memory.peak_host_anon"]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON: Expecting property name enclosed in double quotes in line 1"),
        ("[1]", "is not a perf dump: it has no total_duration_ms and steps"),
        ('{"steps": []}', "is not a perf dump"),
        ('{"total_duration_ms": NaN, "steps": []}', "is not valid JSON: NaN is not a JSON number"),
        ('{"total_duration_ms": null, "steps": []}', "total_duration_ms is null, not a number of at least 0"),
        ('{"total_duration_ms": -1, "steps": []}', "total_duration_ms is -1, not a number of at least 0"),
        ('{"total_duration_ms": 1e999, "steps": []}', "total_duration_ms is Infinity, not a number"),
        ('{"total_duration_ms": 0, "steps": []}', "its total_duration_ms is zero"),
        ('{"total_duration_ms": 1, "steps": [{"name": "a"}]}', "do not have the layout of a dump"),
        ('{"total_duration_ms": 1, "steps": 5}', "do not have the layout of a dump"),
        ('{"total_duration_ms": 1, "steps": [], "schema_version": 99}', "schema version 99, this program"),
        (b"\xff\xfe", "is not UTF-8 text"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_sentence(content, sentence):
    Path("bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        command.main(["compare", "bad.json", "bad.json"])
    assert str(error.value).startswith("bad.json ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["compare"], "needs a BASE and at least one NEW"),
        (["compare", "base.json"], "needs a BASE and at least one NEW"),
        (["compare", "--across", "parallel"], "needs a BASE and at least one NEW"),
        (["compare", "--across", "parallel", "base.json"], "are repeats of one recipe, none differs in parallel"),
        (["compare", "--across", "paralel", "base.json"], "there is no setting 'paralel'; did you mean 'parallel'?"),
        (["compare", "--across", "sampling.seed", "base.json"], "sampling.seed is not part of a recipe"),
        (["compare", "--across", "lora", "base.json"], "lora is not part of a recipe"),
        (["compare", "--across", "cache,,dtype", "base.json"], "'cache,,dtype' is not a list of different keys"),
        (["compare", "--across", "cache,cache", "base.json"], "'cache,cache' is not a list of different keys"),
        (["compare", "base.json", "base.json", "--single", "--confidence", "9"], "no effect with --single"),
        (["compare", "base.json", "none.json"], "none.json does not exist"),
        (["compare", "base.json", "empty"], "The folder empty holds no perf dump"),
        (["compare", "base.json", "base.json", "--jsno", "x"], "Unknown option --jsno; did you mean '--json'?"),
        (["compare", "base.json", "base.json", "--json"], "--json"),
        (["compare", "base.json", "base.json", "--json", "a", "--json", "b"], "--json is given twice"),
        (["compare", "base.json", "base.json", "--tolerance", "totl=2%"], "no metric 'totl'; did you mean 'total'?"),
        (["compare", "base.json", "base.json", "--tolerance", "total=two"], "'total=two' is not of the form"),
        (["compare", "base.json", "base.json", "--tolerance", "memory=3ms"], "'memory=3ms' is not of the form"),
        (["compare", "base.json", "base.json", "--tolerance", "step=2%,3%"], "gives two values of one kind"),
        (["compare", "base.json", "base.json", "--confidence", "high"], "--confidence: 'high'"),
        (["comapre", "base.json"], "Unknown command 'perf comapre'; did you mean 'compare'?"),
    ],
)
def test_wrong_usage_is_one_sentence(argv, sentence):
    save("base.json", ours())
    Path("empty").mkdir()
    with pytest.raises(UserError) as error:
        command.main(argv)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "code"),
    [([], 1), (["total=6%", "step=200ms"], 0), (["total=6%"], 1), (["total=1%,2000ms", "step=6%"], 0)],
)
def test_every_tolerance_can_be_changed(words, code):
    save("base.json", ours())
    save("new.json", ours(1.05))
    options = [option for word in words for option in ("--tolerance", word)]
    assert perf("base.json", "new.json", "--single", *options)[0] == code


def test_the_confidence_widens_the_interval():
    for number, shift in enumerate((0.0, 0.003, -0.002)):
        save(f"base/{number}.json", ours(1 + shift))
        save(f"new/{number}.json", ours(1 + shift))
    narrow, wide = (rows(perf("base", "new", "--confidence", text)[1])["total"]["interval"] for text in ("80%", "99"))
    assert wide[0] < narrow[0] < 1 < narrow[1] < wide[1]


def test_help_states_every_default_tolerance(capsys):
    assert command.main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("total=2%", "stage=10%,120ms", "step=2%", "memory=2%", "--across KEY", "--single"):
        assert word in text
    assert command.main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == command.HELP


def test_the_markdown_file_is_what_is_printed_and_a_prompt_cannot_break_the_table(capsys):
    odd = {**ours(), "meta": {"prompt": "a | b\n## c", "model": "m"}}
    assert command.main(["compare", save("a.json", odd), save("b.json", odd), "--markdown", "out/report.md"]) == 0
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert "## PASS: m, a \\| b ## c" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") - line.count("\\|") for line in table}) == 1
    assert [path.name for path in Path("out").iterdir()] == ["report.md"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--markdown", "file/report.md"), r"file/report\.md cannot be written: Not a directory"),
        (("--json", "folder"), "folder cannot be written: Is a directory"),
        (("--json", ""), "--json must name a file, not ''"),
        (("--json", "new/"), "--json must name a file, and new/ ends in a slash"),
        (("--json", "./a.json"), r"--json \./a\.json would replace a\.json, which is compared; give another name"),
        (("--markdown", "b.json"), r"--markdown b\.json would replace b\.json, which is compared"),
        (("--json", "out/r", "--markdown", "out/r"), "--markdown out/r would replace the report of --json"),
        (("--markdown", "a\0b"), "--markdown must name a file, not"),
        ((" ",), "BASE and NEW must name a file, not ' '"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_a_verdict_whose_exit_code_it_would_imitate(words, sentence):
    Path("file").write_text("")
    Path("folder").mkdir()
    with pytest.raises(UserError, match=sentence):
        command.main(["compare", save("a.json", ours()), save("b.json", ours()), *words])


def test_no_report_replaces_a_dump_of_a_folder_that_is_compared():
    kept = Path(save("base/0.json", ours())).read_bytes()
    with pytest.raises(UserError, match=r"--json base/0\.json would replace base/0\.json, which is compared"):
        command.main(["compare", "base", save("new.json", ours()), "--json", "base/0.json"])
    assert Path("base/0.json").read_bytes() == kept


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.json", "b/0.json"):
        save(f"{tmp_path}/{name}", ours())
    words = ["~/a.json", "~/b", "--json=~/r.json", "--markdown=~/r.md"]
    assert command.main(["compare", *words]) == 0
    assert (tmp_path / "r.json").exists()
    assert (tmp_path / "r.md").exists()


@pytest.mark.whole
def test_a_whole_comparison_of_equal_programs_is_rarely_a_regression():
    generator, trials, regressions = random.Random(3), 40, 0

    def noisy(side: str, number: int) -> dict:
        stages = {name: value * math.exp(generator.gauss(0, 0.02)) for name, value in STAGES.items()}
        found = {**ours(peak=1000 * math.exp(generator.gauss(0, 0.002))), **times(1.0, stages)}
        for entry in found["denoise_steps_ms"]:
            entry["duration_ms"] = stages["denoising"] / 4
        return found

    for _ in range(trials):
        for side in ("base", "new"):
            for number in range(4):
                save(f"{side}/{number}.json", noisy(side, number))
        report = compare(collect(["base"]), collect(["new"]), Rules())
        regressions += report.verdict is Verdict.REGRESSION
    assert regressions / trials <= 0.05


@pytest.mark.whole
def test_comparing_imports_no_heavy_library():
    code = (
        "import sys; from sglang_gen.perf import command, quality; assert command.main(['compare', '--help']) == 0;"
        "heavy = [name for name in ('torch', 'numpy', 'PIL', 'diffusers', 'hydra') if name in sys.modules];"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def run_in_turn(turns: str) -> None:
    """Dumps of base (B) and new (N) in this order, on a machine that becomes slower by 5 % each time."""
    for number, side in enumerate(turns):
        made = ours(1.05**number * (1.1 if side == "N" else 1.0) * (1 + 0.004 * (number % 3)))
        save(f"{side}/{number}.json", {**made, "timestamp": f"2026-01-01T00:{number:02}:00+00:00"})


def test_pairs_that_ran_in_turn_show_a_slowdown_in_spite_of_drift():
    run_in_turn("BNNB" * 4)
    assert perf("B", "N", "--metric", "total")[1]["verdict"] == "TOO_NOISY"
    code, report = perf("B", "N", "--paired", "--metric", "total")
    assert (code, report["verdict"]) == (1, "REGRESSION")
    assert rows(report)["total"]["ratio"] == pytest.approx(1.1, rel=0.005)


def test_two_recipes_that_ran_in_turn_are_compared_in_pairs():
    """As in a sweep whose outermost key is perf.tag, which is no part of a recipe."""
    for number, steps in enumerate((4, 2) * 6):
        made = ours(1.05**number * (0.9 if steps == 2 else 1.0) * (1 + 0.004 * (number % 3)))
        made["fingerprint"] = {"hash": f"steps {steps}", "fields": {**made["fingerprint"]["fields"], "steps": steps}}
        save(f"sweep/{number}/perf.json", {**made, "timestamp": f"2026-01-01T00:{number:02}:00+00:00"})
    words = ("sweep", "--across", "sampling.num_inference_steps", "--metric", "total")
    assert perf(*words)[1]["verdict"] == "TOO_NOISY"
    code, report = perf(*words, "--paired")
    assert (code, report["verdict"]) == (0, "IMPROVEMENT")
    assert rows(report)["total"]["ratio"] == pytest.approx(0.945, rel=0.01)  # 0.9 after 5 % of drift


@pytest.mark.parametrize(
    ("turns", "words", "sentence"),
    [
        ("BBNN", (), "the dumps of BASE and NEW were not made in turn at 2026-01-01T00:00:00.000+00:00"),
        ("BNB", (), "BASE and NEW have 2 and 1 dumps of a recipe; run both in turn, equally often"),
        ("BN", (), "BASE and NEW have 1 and 1 dumps"),
        ("BNBN", ("--single",), "--paired computes intervals, and --single none"),
        ("BNBN", ("--metric", "cpu"), "the dumps have no metric 'cpu'"),
    ],
)
def test_dumps_that_are_no_pairs_are_refused(turns, words, sentence):
    run_in_turn(turns)
    with pytest.raises(UserError) as error:
        command.main(["compare", "B", "N", "--paired", *words])
    assert sentence in str(error.value)


def test_the_same_run_on_both_sides_is_refused():
    for number in range(3):
        made = {**ours(1 + number / 100), "timestamp": f"2026-01-01T00:0{number}:00+00:00", "request_id": f"{number}"}
        save(f"base/{number}.json", made)
        if number == 1:
            save("part/1.json", made)
        save(f"later/{number}.json", {**made, **times(2.0)})
    for words in (["base", "base"], ["base/0.json", "./base/0.json"], ["base", "base", "--paired"]):
        with pytest.raises(
            UserError, match=r"^base/0.json is on both sides, and cannot be compared with itself; leave"
        ):
            command.main(["compare", *words])
    with pytest.raises(UserError, match=r"^part/1.json, the same run as base/1.json, is on both sides"):
        command.main(["compare", "base", "part"])
    with pytest.raises(
        UserError, match=r"BASE and NEW both have a dump of 2026-01-01T00:00:00.000\+00:00, so they are"
    ):
        command.main(["compare", "base", "later", "--paired"])
    assert perf("base", "later")[0] == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fingerprint": {"hash": "aaaa", "fields": [1]}}, "fingerprint.fields is [1], not an object"),
        ({"fingerprint": {"hash": ["a"], "fields": {}}}, 'fingerprint.hash is ["a"], not a text'),
        ({"fingerprint": [1]}, "its entries do not have the layout of a dump"),
        ({"cpu_duration_ms": 0}, "its cpu_duration_ms is zero"),
        ({"total_duration_ms": 1e300}, "total_duration_ms is 1e+300, not a number of at least 0 and below 1e+15"),
        ({"quality": {"samples": [{"psnr": "30"}]}}, 'the measure psnr of an image is "30", not a number'),
    ],
)
def test_a_dump_that_was_edited_by_hand_is_refused_with_its_name(changes, sentence):
    words = ["compare", save("base.json", ours()), save("new.json", {**ours(), **changes})]
    for argv in (words, ["check", "new.json", "--save"]):
        with pytest.raises(UserError) as error:
            command.main(argv)
        assert str(error.value) == f"new.json cannot be compared: {sentence}"
    assert not Path("perf_baseline").exists()


def test_a_fingerprint_never_names_a_file_elsewhere():
    odd = {**ours(hash_="../../../up"), "timestamp": "2026-01-01T00:00:00+00:00"}
    assert command.main(["check", save("odd.json", odd), "--save", "--machine", "m"]) == 0
    assert [path.parent for path in Path().rglob("landscape-*.json")] == [Path("perf_baseline/m")]


def test_several_dumps_of_a_side_are_one_observation_each():
    for number in range(3):
        repeats = [times(1 + number / 10 + index / 1000) for index in range(4)]
        save(f"base/{number}.json", {**ours(), "repeats": repeats})
    _, report = perf("base", save("new.json", ours()))
    assert len(rows(report)["total"]["base"]["observations"]) == 3
    assert "each dump is one observation" in " ".join(report["comparisons"][0]["notes"])
    _, report = perf("base/0.json", "base/1.json")
    assert len(rows(report)["total"]["base"]["observations"]) == 4
