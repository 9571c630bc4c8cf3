"""`sglang perf check`: dumps against the baseline of their machine and fingerprint, and what is added to it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dumps
import pytest

from sglang_gen.errors import UserError
from sglang_gen.perf import check_command, command

FILE = Path("perf_baseline/amd-epyc-7b13/landscape-aaaa.json")


def check(*argv: str) -> tuple[int, dict]:
    code = command.main(["check", *argv, "--json", "check.json"])
    return code, json.loads(Path("check.json").read_text(encoding="utf-8"))


def make(folder: str, factor: float = 1.0, start: int = 0, count: int = 6, **options: object) -> str:
    """A folder of dumps around a factor, with 0.3 % of noise; `start` is the number of the first."""
    for number in range(start, start + count):
        noise = 1 + 0.003 * ((number * 7) % 5 - 2)
        dumps.save(f"{folder}/{number}.json", dumps.ours(factor * noise, number, **options))
    return folder


def entry(**changes: object) -> dict:
    """The observation of one dump in a baseline."""
    known = {"commit": "c", "date": dumps.stamp(0), "id": "i", "images": 2, "metrics": {"total": [9820.0]}}
    return {**known, **changes}


def kept() -> list[dict]:
    return json.loads(FILE.read_text(encoding="utf-8"))["observations"]


@pytest.mark.parametrize(
    ("factor", "code", "verdict"), [(1.0, 0, "PASS"), (1.1, 1, "REGRESSION"), (0.9, 0, "IMPROVEMENT")]
)
def test_dumps_are_judged_against_the_baseline(factor, code, verdict):
    assert check(make("before"), "--save")[0] == 0
    found, report = check(make("after", factor, start=20, count=3))
    assert (found, report["verdict"], report["exit_code"]) == (code, verdict, code)
    row = report["comparisons"][0]["rows"][0]
    assert (row["metric"], len(row["base"]["observations"]), len(row["new"]["observations"])) == ("total", 6, 3)
    assert row["ratio"] == pytest.approx(factor, rel=0.01)
    assert report["saved"] == []
    assert len(kept()) == 6


def test_without_a_baseline_the_exit_code_is_3_and_a_sentence_says_what_makes_one(capsys):
    code, report = check(make("dumps"))
    assert (code, report["verdict"], report["comparisons"]) == (3, "RECIPE_MISMATCH", [])
    assert not Path("perf_baseline").exists()
    sentence = "- no baseline: perf_baseline/amd-epyc-7b13 has no dump of the recipe of dumps/0.json; sglang perf check"
    assert sentence in capsys.readouterr().out
    check("dumps", "--save")
    capsys.readouterr()
    assert check(make("other", hash_="bbbb", fields={**dumps.FIELDS, "dtype": "bfloat16"}))[0] == 3
    assert f"- the nearest baseline, {FILE}, differs: dtype float32 → bfloat16" in capsys.readouterr().out
    both, report = check(make("next", start=20), "other")
    assert (both, [item["verdict"] for item in report["comparisons"]]) == (3, ["PASS"])


def test_the_file_has_one_line_for_each_dump_in_the_order_of_time_and_is_the_same_whatever_the_order_of_saving():
    check(make("late", start=5, count=2), "--save")
    check(make("early", count=2), "--save")
    lines = FILE.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line.strip().rstrip(",")) for line in lines if line.startswith('    {"commit"')]
    assert [entry["date"][11:13] for entry in entries] == ["00", "01", "05", "06"]
    assert list(entries[0]) == ["commit", "date", "id", "images", "metrics"]
    assert entries[0]["commit"] == f"{0:040x}"
    assert next(iter(entries[0]["metrics"])) == "total"
    first = FILE.read_bytes()
    FILE.unlink()
    check("early", "late", "--save")
    assert FILE.read_bytes() == first
    assert json.loads(first)["fingerprint"] == {"fields": dumps.FIELDS, "hash": "aaaa"}


def test_a_dump_counts_once_and_is_not_compared_with_itself():
    check(make("dumps"), "--save")
    code, report = check("dumps/0.json", "--save")
    assert code == 0
    assert len(report["comparisons"][0]["rows"][0]["base"]["observations"]) == 5
    assert len(kept()) == 6
    assert check("dumps")[0] == 3  # no other dump


def test_the_newest_dumps_are_kept():
    check(make("dumps", count=9), "--save", "--keep", "4")
    assert [entry["commit"] for entry in kept()] == [f"{number:040x}" for number in (5, 6, 7, 8)]
    check(make("more", start=9, count=2), "--save")
    assert len(kept()) == 6


def test_a_regression_is_not_saved_and_replace_accepts_it(capsys):
    check(make("before"), "--save")
    make("after", 1.1, start=20)
    assert check("after", "--save")[0] == 1
    assert len(kept()) == 6
    assert "not saved, since it is a REGRESSION: after/20.json; --replace accepts" in capsys.readouterr().out
    code, report = check("after", "--replace")
    assert (code, report["verdict"], report["saved"]) == (1, "REGRESSION", [str(FILE)])
    assert [entry["commit"] for entry in kept()] == [f"{number:040x}" for number in range(20, 26)]
    assert check(make("again", 1.1, start=30))[0] == 0


def test_an_improvement_is_saved_beside_the_slower_dumps_and_the_report_says_so(capsys):
    check(make("before"), "--save")
    assert check(make("after", 0.9, start=20), "--save")[0] == 0
    assert len(kept()) == 12
    assert "- the baseline has slower observations than after/20.json; --replace" in capsys.readouterr().out


def test_two_repeats_of_one_process_prove_nothing_about_the_next_process():
    """Processes differ by 20 %, their repeats hardly: with the repeats as observations this is a false regression."""

    def save(name: str, factor: float, number: int) -> str:
        repeats = [dumps.times(factor * (1 + index / 1000)) for index in range(8)]
        return dumps.save(name, {**dumps.ours(factor, number), "repeats": repeats})

    check(save("a.json", 1.0, 0), save("b.json", 0.8, 1), "--save", "--metric", "total")
    code, report = check(save("c.json", 1.1, 2), "--metric", "total")
    assert (code, report["verdict"]) == (3, "TOO_NOISY")
    assert len(report["comparisons"][0]["rows"][0]["base"]["observations"]) == 2
    code = command.main(["compare", "c.json", "a.json", "b.json", "--metric", "total", "--json", "c"])
    assert code == 3
    assert "each dump is one observation" in json.loads(Path("c").read_text())["comparisons"][0]["notes"][0]


def test_each_machine_has_a_baseline_of_its_own():
    check(make("dumps"), "--save", "--machine", "runner-1")
    assert [path.name for path in Path("perf_baseline").iterdir() if path.is_dir()] == ["runner-1"]
    make("next", start=10)
    assert check("next", "--machine", "runner-2")[0] == 3
    assert check("next", "--machine", "runner-1")[0] == 0
    assert check("next")[0] == 3


def test_the_folder_is_the_machine_whatever_it_was_called_when_its_dumps_were_saved(capsys):
    check(make("before", count=20), "--save")
    FILE.parent.rename("perf_baseline/perf-1")
    shutil.copytree("perf_baseline/perf-1", "perf_baseline/perf-2")
    slow = make("slow", 1.1, start=30)
    for machine in ("perf-1", "perf-2"):
        code, report = check(slow, "--machine", machine, "--save")
        assert (code, report["verdict"], report["saved"]) == (1, "REGRESSION", [])
    assert check(make("same", start=40), "--machine", "perf-2", "--save")[0] == 0
    sizes = {}
    for machine in ("perf-1", "perf-2"):
        content = json.loads(Path(f"perf_baseline/{machine}/{FILE.name}").read_text(encoding="utf-8"))
        sizes[machine] = content["machine"], len(content["observations"])
    assert sizes == {"perf-1": ("amd-epyc-7b13", 20), "perf-2": ("perf-2", 26)}
    assert command.main(["history", "perf_baseline", "--metric", "total"]) == 0
    assert re.findall("on (perf-[12])", capsys.readouterr().out) == ["perf-1", "perf-2"]
    named = ["perf_baseline/perf-1", f"perf_baseline/perf-2/{FILE.name}"]
    assert command.main(["history", *named, "--metric", "total"]) == 0
    assert re.findall("on (perf-[12])", capsys.readouterr().out) == ["perf-1", "perf-2"]


@pytest.mark.parametrize("place", ["perf-2", f"perf-2/{FILE.name}"])
def test_a_link_in_place_of_a_baseline_is_refused(place):
    """Dumps of one machine would be written to the baseline of another."""
    check(make("before", count=20), "--save")
    link = Path("perf_baseline", place)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to((FILE if place.endswith(".json") else FILE.parent).absolute())
    with pytest.raises(UserError, match=f"^{link} is a symbolic link"):
        command.main(["check", make("next", start=30), "--machine", "perf-2", "--save"])


def test_a_dump_and_its_copies_count_once(capsys):
    make("dumps", count=6)
    shutil.copytree("dumps", "copies")
    check(make("before", start=20, count=20), "--save")
    both, alone = (check(words[0], *words[1:])[1] for words in (("dumps", "copies"), ("dumps",)))
    assert both["comparisons"] == alone["comparisons"]


def close(monkeypatch, place: str) -> None:
    """Let nobody ask for the kind of this file."""
    known = os.stat

    def stat(path, **options):
        if str(path) == place:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)
        return known(path, **options)

    monkeypatch.setattr(os, "stat", stat)


def test_a_baseline_in_a_folder_that_is_closed_is_refused_by_its_name(monkeypatch):
    make("new", count=1)
    Path("b").mkdir()
    close(monkeypatch, "b/.lock")
    with pytest.raises(UserError, match=r"^b cannot be written: Permission denied$"):
        command.main(["check", "new", "--baseline", "b", "--save"])


@pytest.mark.whole
def test_checks_that_run_at_once_keep_the_dumps_of_all():
    for number in range(8):
        make(str(number), start=10 * number, count=2)
    code = "import sys; from sglang_gen.perf import command; sys.exit(command.main(sys.argv[1:]))"
    words = [[sys.executable, "-c", code, "check", str(number), "--save", "--metric", "total"] for number in range(8)]
    processes = [subprocess.Popen(each, stdout=subprocess.DEVNULL) for each in words]
    assert {process.wait() for process in processes} <= {0, 3}
    assert len(kept()) == 16


def test_a_baseline_that_another_check_keeps_locked_is_an_error_in_one_sentence(monkeypatch):
    from filelock import FileLock

    check(make("dumps"), "--save")
    monkeypatch.setattr(check_command, "LONGEST_WAIT", 0.1)
    make("next", start=20)
    with FileLock("perf_baseline/.lock"):
        with pytest.raises(UserError, match="perf_baseline has been locked by another run for 0 s"):
            command.main(["check", "next", "--save"])
        assert check("next")[0] == 0  # which changes nothing


@pytest.mark.parametrize("command_", [["check", "new", "--baseline", "b"], ["history", "b"], ["compare", "b", "new"]])
@pytest.mark.parametrize("place", ["b", "b/m"])
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(command_, place, monkeypatch):
    dumps.save("b/m/a.json", dumps.ours())
    make("new", count=1)
    known = os.scandir

    def scandir(path):
        if str(path) == place:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return known(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"^{place} cannot be read: Permission denied$"):
        command.main(command_)


@pytest.mark.parametrize("words", ["check new --baseline b/m", "history b/m", "compare b/m new"])
def test_a_folder_that_cannot_be_reached_is_not_a_missing_one(words, monkeypatch):
    make("new", count=1)
    close(monkeypatch, "b/m")
    with pytest.raises(UserError, match=r"^b/m cannot be read: Permission denied$"):
        command.main(words.split())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"observations": [entry(metrics={"total": [0]})]}, "its total_duration_ms is zero"),
        (
            {"observations": [entry(metrics={"total": [1e15]})]},
            "total is 1000000000000000.0, not a number",
        ),
        ({"observations": [entry(metrics={"total": [10**400]})]}, "total is 1000000000000000"),
        ({"observations": [entry(metrics={"total": ["9"]})]}, 'total is "9", not a number'),
        ({"observations": [entry(metrics={"total": [True]})]}, "total is true, not a number"),
        ({"observations": [entry(metrics={"total": []})]}, "a value is missing"),
        ({"observations": [entry(metrics={"step": [1.0]})]}, "a value is missing"),
        ({"observations": [entry(metrics={"total": [1.0], "cpu": [0]})]}, "its cpu_duration_ms is zero"),
        ({"observations": [entry(metrics={"total": [1.0], "calibration": [0]})]}, "its calibration_cpu_ms is zero"),
        ({"observations": [entry(images="2")]}, 'images is "2", not a number of images'),
        ({"observations": [entry(date="yesterday")]}, 'its timestamp is "yesterday", not a date'),
        ({"observations": [entry(commit=5)]}, "commit is 5, not a text"),
        ({"observations": [5]}, "its observations do not have the layout of a baseline"),
        ({"observations": 5}, "its observations do not have the layout of a baseline"),
        ({"fingerprint": {"hash": "aaaa", "fields": []}}, "fingerprint.fields is [], not an object"),
        ({"fingerprint": {"hash": 5, "fields": {}}}, "fingerprint.hash is 5, not a text"),
        ({"meta": {}}, "a value is missing"),
        ({"meta": []}, "its observations do not have the layout of a baseline"),
    ],
)
def test_a_baseline_that_was_edited_by_hand_is_refused_with_its_name(changes, sentence):
    make("dumps", count=1)
    whole = {"baseline_version": 1, "machine": "m", "meta": {"model": "m", "prompt": "p"}}
    good = {**whole, "fingerprint": {"hash": "aaaa", "fields": {}}, "observations": [entry()]}
    dumps.save("b/m/a.json", {**good, **changes})
    for words in (["check", "dumps", "--baseline", "b", "--machine", "m"], ["history", "b"]):
        with pytest.raises(UserError) as error:
            command.main(words)
        assert str(error.value).startswith("b/m/a.json cannot be read: ")
        assert sentence in str(error.value)


def test_dumps_of_sglang_have_a_baseline():
    for number in range(9):
        dumps.save(f"{'old' if number < 6 else 'new'}/{number}.json", dumps.upstreams(1 + number % 3 / 500, number))
    assert check("old", "--save")[1]["saved"][0].startswith("perf_baseline/unknown/model-")
    code, report = check("new")
    assert (code, report["verdict"]) == (0, "PASS")
    assert len(report["comparisons"][0]["rows"][0]["base"]["observations"]) == 6  # although all have one request id


def test_the_processor_time_is_judged_by_default_and_the_noisy_wall_clock_is_not():
    for number in range(8):
        made = dumps.ours(1.0 + 0.3 * (number % 2), number)
        dumps.save(f"dumps/{number}.json", {**made, "cpu_duration_ms": 500.0 + number % 3 + (60 if number > 5 else 0)})
    check(*(f"dumps/{number}.json" for number in range(6)), "--save")
    code, report = check("dumps/6.json", "dumps/7.json", "--metric", "cpu")
    assert (code, [row["metric"] for row in report["comparisons"][0]["rows"]]) == (1, ["cpu"])
    code, report = check("dumps/6.json", "dumps/7.json")
    assert (code, [row["metric"] for row in report["comparisons"][0]["rows"]]) == (1, ["memory.peak_host_anon", "cpu"])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "needs at least one perf dump or folder"),
        (["dumps", "--keep", "3"], "--keep has no effect without --save or --replace"),
        (["dumps", "--save", "--keep", "none"], "--keep: 'none' is not a number of dumps, such as 50"),
        (["dumps", "--machine", "../x"], "--machine: '../x' may have letters, digits"),
        (["dumps", "--machine", ""], "--machine: '' may have letters, digits"),
        (["dumps", "--baseline", ""], "--baseline must name a file, not ''"),
        (["dumps", "--confidence", ""], "--confidence: '' is not a percentage"),
        (["dumps", "--save", "--replace"], "--save and --replace are two ways to change a baseline; leave out one"),
        (["dumps", "--save", "--baseline", "file"], "file cannot be written: It is not a folder"),
        (["dumps", "--baseline", "twice"], "twice/m/a.json and twice/m/b.json are baselines of one recipe and machine"),
        (["dumps", "--save", "--baseline", "taken"], "taken/amd-epyc-7b13/landscape-aaaa.json would be replaced, and"),
        (["dumps", "--baseline", "file"], "--baseline: file is not a folder"),
        (["dumps", "--baseline", "odd"], "odd/a.json is not a baseline of sglang perf check"),
        (["dumps", "--baseline", "newer"], "newer/a.json has baseline version 9, this program reads version 1"),
        (["dumps", "--baseline", "broken"], "broken/a.json cannot be read: total is -1, not a number of at least 0"),
        (["dumps", "--baseline", "empty"], "empty/a.json has no observations; delete it"),
        (["old.json", "--save"], "old.json has no timestamp, so it cannot be added to a baseline"),
        (["dumps", "--metric", "cpu"], "the dumps have no metric 'cpu'"),
        (["dumps", "--sav"], "Unknown option --sav; did you mean '--save'? (sglang perf check --help lists all)"),
        (["dumps", "--json", "dumps/0.json"], "--json dumps/0.json would replace dumps/0.json"),
    ],
)
def test_wrong_usage_of_check_is_one_sentence(argv, sentence):
    make("dumps", count=1)
    dumps.save("old.json", {key: value for key, value in dumps.ours().items() if key != "timestamp"})
    dumps.save("odd/a.json", dumps.ours())
    whole = {"baseline_version": 1, "machine": "m", "meta": {}, "fingerprint": {"hash": "a", "fields": {}}}
    dumps.save("newer/a.json", {**whole, "baseline_version": 9, "observations": []})
    dumps.save("broken/a.json", {**whole, "observations": [{"metrics": {"total": [-1]}}]})
    dumps.save("empty/a.json", {**whole, "observations": []})
    good = {**whole, "meta": {"model": "m", "prompt": "p"}, "observations": [entry()]}
    for name in ("twice/m/a.json", "twice/m/b.json", "taken/amd-epyc-7b13/landscape-aaaa.json"):
        dumps.save(name, good)
    Path("file").write_text("")
    with pytest.raises(UserError) as error:
        command.main(["check", *argv])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_help_of_each_command_states_its_exit_codes(capsys):
    for name in ("compare", "check", "history"):
        assert command.main([name, "--help"]) == 0
        assert "exit codes: 0" in capsys.readouterr().out
