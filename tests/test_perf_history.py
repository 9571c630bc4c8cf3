"""`sglang perf history`: change points over commits, by the statistics and from dumps; the reports say the same."""

import json
import math
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import dumps
import pytest

from sglang_gen.errors import UserError
from sglang_gen.perf import command
from sglang_gen.perf.change_points import Place, Rule, find
from sglang_gen.perf.history_markdown import BLOCKS, sparkline
from sglang_gen.perf.log_ratio import Difference, Noise, independent
from sglang_gen.perf.statistics import Verdict, judge

RULE = Rule(lambda _: 0.02)


def noisy(levels: list[float], spread: float, seed: int, correlation: float = 0.0) -> list[Place]:
    """Log-normal values around the levels, of commits with one dump each."""
    generator, drift, places = random.Random(seed), 0.0, []
    for level in levels:
        drift = correlation * drift + math.sqrt(1 - correlation**2) * generator.gauss(0, spread)
        places.append(Place(level * math.exp(drift), 1))
    return places


def history(*argv: str) -> list[dict]:
    assert command.main(["history", *argv, "--json", "history.json"]) == 0
    return json.loads(Path("history.json").read_text(encoding="utf-8"))["histories"]


def changes(report: dict) -> dict[str, list[str]]:
    """Metric -> commits of its changes."""
    return {
        series["metric"]: [
            report["commits"][series["commits"][change["index"]]]["name"] for change in series["changes"]
        ]
        for series in report["series"]
    }


@pytest.mark.parametrize("at", [3, 15, 27])
def test_a_planted_slowdown_of_10_percent_in_a_history_of_30_dumps_is_found_at_its_commit(at, capsys):
    generator = random.Random(at)
    for number in range(30):
        factor = math.exp(generator.gauss(0, 0.01)) * (1.1 if number >= at else 1.0)
        dumps.save(f"dumps/{number}.json", dumps.ours(factor, number))
    (report,) = history("dumps", "--metric", "total")
    assert changes(report) == {"total": [f"{at:040x}"]}
    (change,) = report["series"][0]["changes"]
    low, high = change["interval"]
    assert 1.02 < low < 1.1 < high
    assert change["verdict"] == "REGRESSION"
    assert change["confidence"] > 0.99
    assert re.search(rf"\| total \| {at:040x}"[:20] + r"0* \| 2026-01-0\d \| \+\d+\.\d% \|", capsys.readouterr().out)


def test_a_slowdown_and_its_repair_are_two_changes():
    places = noisy([100.0] * 10 + [110.0] * 8 + [100.0] * 12, 0.01, 1)
    assert [(change.index, change.verdict) for change in find(places, RULE)] == [
        (10, Verdict.REGRESSION), (18, Verdict.IMPROVEMENT),
    ]  # fmt: skip


def test_a_steady_history_has_no_change_and_rarely_a_false_one():
    alarms = [bool(find(noisy([100.0] * 30, 0.02, seed), Rule(lambda _: 0.0, 0.9))) for seed in range(60)]
    assert 0 < sum(alarms) / 60 < 0.2  # 0.1 is asked for; without a tolerance, so that it is reached at all
    assert not any(find(noisy([100.0] * 30, 0.02, seed), RULE) for seed in range(30))


def test_a_machine_that_drifts_gives_few_false_changes():
    drifting = [noisy([100.0] * 30, 0.03, seed, correlation=0.6) for seed in range(40)]
    assert sum(bool(find(places, RULE)) for places in drifting) <= 2


def test_a_single_slow_dump_is_no_change_and_two_of_a_commit_are():
    steady = noisy([100.0] * 20, 0.005, 2)
    assert find([*steady, Place(120.0, 1)], RULE) == []
    assert [change.index for change in find([*steady, Place(120.0, 2)], RULE)] == [20]
    assert find([*steady[:10], Place(120.0, 1), *steady[10:]], RULE) == []


@pytest.mark.parametrize("places", [[], [Place(1.0, 5)], [Place(1.0, 2)] * 5, [Place(1.0, 1), Place(2.0, 1)]])
def test_a_history_without_evidence_has_no_change(places):
    assert find(places, RULE) == []


def test_a_change_within_the_tolerance_is_none():
    places = noisy([100.0] * 15 + [105.0] * 15, 0.002, 3)
    assert [change.index for change in find(places, RULE)] == [15]
    assert find(places, Rule(lambda _: 0.06)) == []


def test_the_p_value_and_the_interval_of_a_difference_agree_with_the_verdict():
    base, new = [100.0, 101.0, 99.0, 100.5], [104.0, 106.0, 105.0]
    found, judged = independent(*([math.log(value) for value in side] for side in (base, new))), judge(base, new, 0.02)
    assert found.interval(0.95) == pytest.approx(judged.interval)
    p_value = found.p_value(0.02)
    assert judge(base, new, 0.02, 1 - 1.01 * p_value).verdict is Verdict.REGRESSION
    assert judge(base, new, 0.02, 1 - 0.99 * p_value).verdict is Verdict.TOO_NOISY
    assert Difference(-found.shift, found.error, found.freedom).p_value(0.02) > p_value  # -log 0.98 > log 1.02
    assert found.p_value(0.06) == 1.0


def test_correlated_observations_have_a_larger_error_and_less_freedom():
    base, new = [0.0] * 10, [0.1] * 10
    alone, alike = Noise(0.01, 30, 0.0).difference(base, new), Noise(0.01, 30, 0.5).difference(base, new)
    assert (alone.error, alone.freedom) == pytest.approx((0.1 * math.sqrt(0.2), 30.0))
    assert (alike.error, alike.freedom) == pytest.approx((alone.error * math.sqrt(3), 10.0))
    assert Noise(0.01, 300, 0.5).difference(base, new).freedom == pytest.approx(100.0)
    assert Noise(0.01, 12, 0.9).difference(base, new).freedom == 10.0
    assert Noise(0.01, 2, 0.9).difference(base, new).freedom == 2.0
    assert Noise(0.0, 0, 0.0).difference([0.0], [0.1]).error is None


def test_a_history_that_is_too_short_says_so(capsys):
    sentence = "Fewer than 8 commits do not show their noise, so changes may not be found"
    for number in range(18):
        dumps.save(f"dumps/{number}.json", dumps.ours(1.1 if number >= 9 else 1.0, number, f"{number // 9:040x}"))
    (report,) = history("dumps", "--metric", "total,step", "--html", "h.html")
    assert changes(report) == {"total": [], "step": []}
    assert sentence in capsys.readouterr().out
    assert sentence in Path("h.html").read_text()
    for number in range(18, 80):
        dumps.save(f"dumps/{number}.json", dumps.ours(1.1, number, f"{number // 9:040x}"))
    history("dumps", "--metric", "total")
    assert sentence not in capsys.readouterr().out


def test_dumps_of_one_commit_are_repeats_and_commits_are_in_the_order_of_time(capsys):
    for number, (commit, factor) in enumerate([("a" * 40, 1.0), ("b" * 40, 1.0), ("a" * 40, 1.1), ("c" * 40, 1.0)]):
        dumps.save(f"dumps/{9 - number}.json", dumps.ours(factor, number, commit))
    dumps.save("copy/0.json", dumps.ours(1.0, 0, "a" * 40))  # the same dump in another file
    (report,) = history("dumps", "copy", "--metric", "total")
    assert [(commit["name"][0], commit["dumps"]) for commit in report["commits"]] == [("a", 2), ("b", 1), ("c", 1)]
    assert report["series"][0]["values"][0] == pytest.approx(9820 * math.sqrt(1.1))
    assert "4 dumps of 3 commits, 2026-01-01 to 2026-01-01." in capsys.readouterr().out


def test_dumps_of_sglang_have_a_history():
    for number in range(12):
        factor = (1.1 if number >= 7 else 1.0) * (1 + 0.002 * (number % 3))
        dumps.save(f"dumps/{number}.json", dumps.upstreams(factor, number))
    (report,) = history("dumps", "--metric", "total,stage.DenoisingStage", "--tolerance", "stage=2%")
    assert (report["model"], report["machine"], report["fingerprint"]) == ("a/model", "unknown", None)
    assert changes(report) == {"total": [f"{7:040x}"], "stage.DenoisingStage": [f"{7:040x}"]}
    for number, absent in enumerate(("N/A", None)):
        dumps.save(f"none/{number}.json", {**dumps.upstreams(1.0, number), "commit_hash": absent})
    (report,) = history("none", "--metric", "total")
    assert [commit["name"] for commit in report["commits"]] == [None, None]


def test_every_fingerprint_and_machine_has_a_history_of_its_own():
    for number in range(4):
        dumps.save(f"dumps/a{number}.json", dumps.ours(1.0, number))
        dumps.save(f"dumps/b{number}.json", dumps.ours(2.0, number, hash_="bbbb"))
        other = {**dumps.ours(3.0, number), "machine": {**dumps.MACHINE, "gpus": ["NVIDIA H200"] * 4}}
        dumps.save(f"dumps/c{number}.json", other)
    found = {(item["machine"], item["fingerprint"]) for item in history("dumps")}
    assert found == {("amd-epyc-7b13", "aaaa"), ("amd-epyc-7b13", "bbbb"), ("4x-nvidia-h200", "aaaa")}


def test_a_history_of_a_baseline_is_that_of_its_dumps():
    for number in range(10):
        dumps.save(f"dumps/{number}.json", dumps.ours(1 + number / 1000 + (0.1 if number > 5 else 0), number))
    assert command.main(["check", "dumps", "--save"]) == 0
    assert history("perf_baseline") == history("dumps")
    assert len(history("perf_baseline", "dumps")) == 1


def test_the_page_shows_each_metric_and_change_without_scripts_or_other_files():
    for number in range(12):
        made = dumps.ours((1.2 if number >= 6 else 1.0) * (1 + 0.002 * (number % 3)), number)
        made["meta"]["prompt"] = "a <script>alert(1)</script> & lake"
        dumps.save(f"dumps/{number}.json", made)
    history("dumps", "--html", "out/history.html")
    page = Path("out/history.html").read_text(encoding="utf-8")
    tree = ET.fromstring(re.sub(r"<(meta[^>]*)>", r"<\1/>", page.removeprefix("<!DOCTYPE html>\n")))
    assert len(list(tree.iter("svg"))) == len(history("dumps")[0]["series"])
    assert not list(tree.iter("script"))
    assert "http://" not in page
    assert "https://" not in page
    circles = list(next(tree.iter("svg")).iter("circle"))
    assert [circle[0].text.split(",")[0] for circle in circles] == [f"{number:040x}"[:10] for number in range(12)]
    heights = [float(circle.get("cy")) for circle in circles]
    assert min(heights[:6]) > max(heights[6:]) + 50  # slower is higher
    assert "+20." in page or "+19." in page
    assert 'class="worse"' in page


def test_the_line_of_blocks_rises_with_the_values_and_small_noise_stays_small():
    assert sparkline([1.0, 2.0, 4.0]) == f"{BLOCKS[0]}{BLOCKS[4]}{BLOCKS[-1]}"
    assert set(sparkline([100.0, 100.1, 100.05])) <= set(BLOCKS[3:6])
    assert len(sparkline([1.0] * 1000)) == 60
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "needs at least one perf dump, baseline or folder"),
        (["none"], "none does not exist"),
        (["empty"], "The folder empty holds no perf dump and no baseline"),
        (["old.json"], "old.json has no timestamp, so it has no place in a history"),
        (["odd.json"], 'odd.json cannot be compared: its timestamp is "yesterday", not a date of ISO 8601'),
        (["one.json", "--metric", "totl"], "the dumps have no metric 'totl'; did you mean 'total'?"),
        (
            ["one.json", "--metric", "total", "--tolerance", "step=3%"],
            "step=3% has no effect, since step is not judged",
        ),
        (["one.json", "--htlm", "x"], "Unknown option --htlm; did you mean '--html'? (sglang perf history --help"),
        (["one.json", "--html", "one.json"], "--html one.json would replace one.json"),
        (["one.json", "--confidence", "0"], "--confidence: '0' is not a percentage"),
    ],
)
def test_wrong_usage_of_history_is_one_sentence(argv, sentence):
    Path("empty").mkdir()
    dumps.save("one.json", dumps.ours())
    dumps.save("old.json", {key: value for key, value in dumps.ours().items() if key != "timestamp"})
    dumps.save("odd.json", {**dumps.ours(), "timestamp": "yesterday"})
    with pytest.raises(UserError) as error:
        command.main(["history", *argv])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_single_commit_has_values_and_no_change(capsys):
    dumps.save("one.json", dumps.ours())
    (report,) = history("one.json")
    assert [series["changes"] for series in report["series"]] == [[]] * len(report["series"])
    assert "1 dump of 1 commit, 2026-01-01 to 2026-01-01." in capsys.readouterr().out


def test_without_ruptures_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sglang-gen\[history\]'"):
        command.main(["history", "dumps"])
