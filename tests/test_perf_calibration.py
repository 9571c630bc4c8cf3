"""Calibrated processor time: fixed work beside a generation, analysis of covariance, checks on busy machines."""

import json
import math
import random
from pathlib import Path

import dumps
import numpy as np
import pytest

from sglang_gen.errors import UserError
from sglang_gen.perf import calibration, command
from sglang_gen.perf.covariance import adjusted, adjusted_pairs
from sglang_gen.perf.log_ratio import drifting
from sglang_gen.perf.statistics import Verdict, judge
from sglang_gen.plan import make
from tools import perf_rates

QUICK = ("--num-inference-steps", "1", "--height", "32", "--width", "32", "perf=light")
BASELINE = Path("perf_baseline/amd-epyc-7b13/landscape-aaaa.json")


def busy(
    count: int, seed: int, factor: float = 1.0, load: float = 0.0, slope: float = 1.3
) -> tuple[list[float], list[float]]:
    """Logarithms of processor times and calibrations on a machine whose speed drifts around a `load`.

    The load raises processor times by `slope`, the drift by 1.3 of what it raises calibrations.
    """
    generator, speed = random.Random(seed), 0.0
    times, speeds = [], []
    for _ in range(count):
        speed = 0.5 * speed + generator.gauss(0, 0.05)
        speeds.append(load + speed + generator.gauss(0, 0.005))
        times.append(math.log(350 * factor) + slope * load + 1.3 * speed + generator.gauss(0, 0.02))
    return times, speeds


def test_the_ratio_is_the_coefficient_of_the_side_in_a_least_squares_fit():
    (base, base_speeds), (new, new_speeds) = busy(12, 1), busy(7, 2, 1.05)
    found = adjusted(base, new, base_speeds, new_speeds)
    side = [0.0] * 12 + [1.0] * 7
    design = np.column_stack([np.ones(19), side, base_speeds + new_speeds])
    coefficients, squares, _, _ = np.linalg.lstsq(design, np.array(base + new), rcond=None)
    assert found.shift == pytest.approx(coefficients[1], abs=1e-12)
    own = math.sqrt(squares[0] / 16 * np.linalg.inv(design.T @ design)[1, 1])
    assert found.error >= own  # which knows nothing of drift and of other slopes
    assert found.freedom <= 16


def test_calibrations_that_do_not_vary_change_nothing():
    base, new = busy(10, 1)[0], busy(6, 2)[0]
    plain, same = drifting(base, new), adjusted(base, new, [0.0] * 10, [0.0] * 6)
    assert same.shift == pytest.approx(plain.shift)
    assert same.error == pytest.approx(plain.error, rel=0.05)


def test_pairs_are_adjusted_by_the_intercept_of_a_line():
    (base, base_speeds), (new, new_speeds) = busy(9, 3), busy(9, 4, 1.05)
    found = adjusted_pairs(base, new, base_speeds, new_speeds)
    differences, speeds = np.subtract(new, base), np.subtract(new_speeds, base_speeds)
    design = np.column_stack([np.ones(9), speeds])
    coefficients, squares, _, _ = np.linalg.lstsq(design, differences, rcond=None)
    assert found.shift == pytest.approx(coefficients[0], abs=1e-12)
    assert found.error >= math.sqrt(squares[0] / 7 * np.linalg.inv(design.T @ design)[0, 0])
    assert found.freedom == 7


def rates(new_count: int, load: float = 0.0, adjust: bool = True) -> tuple[float, float]:
    """False alarms and slowdowns of 10 % that are not found, over 200 simulated checks."""
    alarms = lost = 0
    for trial in range(200):
        slope = random.Random(trial).gauss(1.3, 0.25)
        (base, base_speeds), (new, new_speeds) = busy(20, trial), busy(new_count, 1000 + trial, 1.0, load, slope)
        for factor in (1.0, 1.1):
            sides = [[math.exp(value) for value in base], [factor * math.exp(value) for value in new]]
            speeds = (base_speeds, new_speeds)
            difference = (lambda x, y, speeds=speeds: adjusted(x, y, *speeds)) if adjust else drifting
            is_slow = judge(*sides, 0.02, 0.99, difference).verdict is Verdict.REGRESSION
            alarms += is_slow and factor == 1.0
            lost += not is_slow and factor == 1.1
    return alarms / 200, lost / 200


def test_ten_calibrated_dumps_find_a_slowdown_on_a_drifting_machine_and_raise_no_false_alarms():
    alarms, lost = rates(10)
    assert alarms <= 0.01
    assert lost <= 0.05
    assert rates(10, adjust=False)[1] > 0.5


def test_a_machine_of_another_speed_gives_no_false_alarms():
    assert rates(10, load=0.1)[0] <= 0.01
    assert rates(10, load=0.4)[0] == 0


def test_the_rates_on_recorded_runs_keep_both_aims_for_the_documented_procedure():
    """Baseline and new dumps of different times, 100 samples of each; docs/comparing.md has the table."""
    recorded = perf_rates.recordings()
    chosen, later = (recorded[name] for name in ("chosen", "later"))
    for base, new in ((later, later), (chosen, later)):
        check_aims(perf_rates.rated(perf_rates.at_another_time(base, new, 20, 10), perf_rates.by_check, 100))
    by_pairs = perf_rates.by_calibrated(adjusted_pairs, 0.95)
    check_aims(perf_rates.rated(perf_rates.in_turn(later, 10), by_pairs, 100))


def check_aims(rates: tuple[float, float, float]) -> None:
    alarms, passed, lost = rates
    assert alarms <= perf_rates.MOST_ALARMS
    assert passed == 0
    assert lost <= perf_rates.MOST_LOST


def save(folder: str, count: int, start: int = 0, factor: float = 1.0, wall: float = 0.3) -> str:
    """Dumps of a drifting machine, whose wall clock has this much noise."""
    times, speeds = busy(count, 7 + start, factor)
    for number, (cpu, fixed) in enumerate(zip(times, speeds, strict=True), start):
        content = dumps.ours(1 + wall * (number % 3 - 1), number)
        values = {"cpu_duration_ms": math.exp(cpu), "calibration_cpu_ms": 30 * math.exp(fixed)}
        dumps.save(f"{folder}/{number}.json", {**content, **values})
    return folder


def check(*argv: str) -> tuple[int, dict]:
    code = command.main(["check", *argv, "--json", "check.json"])
    (comparison,) = json.loads(Path("check.json").read_text(encoding="utf-8"))["comparisons"] or [{}]
    return code, comparison


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.1, 1)])
def test_a_check_on_a_busy_machine_decides_by_calibrated_processor_time_and_says_what_it_left_out(factor, code):
    check(save("base", 20), "--save")
    assert all("calibration" in entry["metrics"] for entry in json.loads(BASELINE.read_text())["observations"])
    found, comparison = check(save("new", 10, 20, factor))
    assert found == code
    assert [row["metric"] for row in comparison["rows"]] == ["memory.peak_host_anon", "cpu"]
    assert comparison["rows"][1]["ratio"] == pytest.approx(factor, rel=0.03)
    left_out, adjustment = (note for note in comparison["notes"] if "cpu" in note)
    assert left_out.startswith("not judged, since the machine was not quiet (noise up to ")
    assert "total" in left_out
    assert adjustment.startswith("cpu is adjusted for the speed of the machine; its calibration takes ")


def test_pairs_of_a_busy_machine_are_adjusted_too():
    for turn in range(10):
        for side, factor in (("base", 1.0), ("new", 1.1)):
            save(side, 1, 2 * turn + (side == "new"), factor)
    words = ("compare", "base", "new", "--paired", "--metric", "cpu", "--json", "c.json")
    assert command.main([*words]) == 1
    assert any("adjusted" in note for note in json.loads(Path("c.json").read_text())["comparisons"][0]["notes"])


def save_history(slope: float, seed: int) -> None:
    """Eight commits with five dumps each, of which the fifth is slower by 10 %, on a drifting machine."""
    times, speeds = busy(40, seed)
    for number, (cpu, fixed) in enumerate(zip(times, speeds, strict=True)):
        slow = 1.1 if number >= 20 else 1.0
        values = {"cpu_duration_ms": slow * math.exp(cpu), "calibration_cpu_ms": 30 * math.exp(slope * fixed)}
        dumps.save(f"dumps/{number}.json", {**dumps.ours(1.0, number, commit=f"{number // 5:040x}"), **values})


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_history_of_processor_times_is_adjusted_and_finds_the_commit(seed, capsys):
    save_history(1.0, seed)
    assert command.main(["history", "dumps", "--metric", "cpu", "--json", "history.json"]) == 0
    (found,) = json.loads(Path("history.json").read_text(encoding="utf-8"))["histories"]
    assert found["is_adjusted"]
    (change,) = found["series"][0]["changes"]
    assert (change["index"], change["verdict"]) == (4, "REGRESSION")
    assert "cpu is adjusted for the speed of the machine" in capsys.readouterr().out


def test_a_history_without_processor_times_or_calibrations_is_not_adjusted():
    save_history(0.0, 1)
    for number in range(40):
        place = Path(f"dumps/{number}.json")
        content = json.loads(place.read_text())
        del content["calibration_cpu_ms"]
        dumps.save(place, content)
    for metric in ("cpu", "total"):
        assert command.main(["history", "dumps", "--metric", metric, "--json", "history.json"]) == 0
        assert not json.loads(Path("history.json").read_text())["histories"][0]["is_adjusted"]


def test_a_check_on_a_quiet_machine_judges_the_wall_clock_too():
    check(save("base", 20, wall=0.002), "--save")
    _, comparison = check(save("new", 10, 20, wall=0.002))
    assert {"total", "step", "stage.denoising", "cpu"} <= {row["metric"] for row in comparison["rows"]}


def test_a_named_wall_clock_is_judged_whatever_its_noise():
    check(save("base", 20), "--save")
    code, comparison = check(save("new", 10, 20), "--metric", "total")
    assert (code, [row["verdict"] for row in comparison["rows"]]) == (3, ["TOO_NOISY"])


def test_dumps_without_a_calibration_are_counted_and_prevent_the_adjustment():
    check(save("base", 20), "--save")
    place = Path(save("new", 10, 20), "29.json")
    dumps.save(place, {key: value for key, value in json.loads(place.read_text()).items() if "calibration" not in key})
    _, comparison = check("new")
    (note,) = (note for note in comparison["notes"] if "adjusted" in note)
    assert note == "cpu is not adjusted, since 1 of 30 dumps has no calibration (perf.calibrate)"


def test_the_calibration_is_no_metric_of_the_program():
    with pytest.raises(UserError, match="the dumps have no metric 'calibration'"):
        command.main(["check", save("new", 10), "--metric", "calibration"])


def test_nothing_is_measured_unless_it_is_asked_for():
    idle, active = calibration.calibration(False, "float32"), calibration.calibration(True, "float32")
    for one in (idle, active):
        with one.generation():
            pass
    report = {"repeats": [{}]}
    calibration.add(report, idle)
    assert report == {"repeats": [{}], "calibration_cpu_ms": None}
    calibration.add(report, active)
    assert report["calibration_cpu_ms"] == report["repeats"][0]["calibration_cpu_ms"] > 0


@pytest.mark.whole
def test_each_repeat_of_a_run_has_its_calibration(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a lake", "--seed", "1", *QUICK,
                  "perf.repeat=3", "perf.calibrate=true", "--perf-dump-path", "perf.json")  # fmt: skip
    assert done.code == 0, done.err
    dump = json.loads(Path("perf.json").read_text())
    assert all(repeat["calibration_cpu_ms"] > 0 for repeat in dump["repeats"])
    assert dump["calibration_cpu_ms"] == dump["repeats"][0]["calibration_cpu_ms"]


@pytest.mark.whole
def test_a_calibration_without_a_dump_is_a_warning(sglang, pipelines):
    done = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", "perf.calibrate=true", *QUICK[:6])
    assert "WARNING: perf.calibrate has no effect without --perf-dump-path" in done.err


def test_a_calibration_on_a_gpu_is_refused(sglang, pipelines, monkeypatch):
    monkeypatch.setattr(make, "choose_device", lambda _: "cuda")
    gpu = sglang("generate", "--model-path", pipelines["sd3"], "--prompt", "a", "perf.calibrate=true", "dry_run=true")
    assert gpu.code == 2
    assert "perf.calibrate relates processor time to that of a fixed work" in gpu.lines[-1]
