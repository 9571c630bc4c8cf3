"""The benchmark of step caches on the embedded model."""

import numpy as np
import pytest

from tools.bench import step_caches


def dump(*repeats: list[tuple[int, float]]) -> dict:
    """A dump of generations with (image, milliseconds) of each step."""
    steps = [[{"step": 0, "duration_ms": ms, "batch": image} for image, ms in repeat] for repeat in repeats]
    return {"repeats": [{"denoise_steps_ms": each} for each in steps]}


def test_the_time_of_an_image_is_that_of_its_steps():
    found = step_caches.image_times(dump([(0, 1.0), (0, 2.0), (1, 5.0)], [(0, 3.0), (0, 3.0), (1, 6.0)]))
    assert found.tolist() == [[3.0, 5.0], [6.0, 6.0]]


def test_a_slow_repeat_moves_the_interval_of_few_repeats_and_never_the_ratio():
    exact = np.full((6, 16), 10.0)
    cell = np.full((6, 16), 5.0)
    assert step_caches.ratio(exact, cell) == (2.0, 2.0, 2.0)
    cell[0] = 50.0
    assert step_caches.ratio(exact, cell) == (2.0, 2.0, 2.0)
    assert step_caches.ratio(exact[:2], cell[:2]) == (2.0, 0.2, 2.0)


def test_presets_with_a_mask_are_measured_at_its_number_of_steps_only(tmp_path):
    plan = tmp_path / "plan.json"
    at_28, at_50 = (step_caches.cells(steps, {"planned_0.5": plan}) for steps in (28, 50))
    assert set(at_28) - set(at_50) == {"scm_slow", "scm_fast"}
    assert next(iter(at_28)) == "none"
    assert at_28["planned_0.5"] == {"method": "planned", "plan_file": str(plan)}
    assert {option["Fn_compute_blocks"] for name, option in at_28.items() if name not in ("none", "planned_0.5")} == {1}


@pytest.mark.slow
def test_the_table_has_times_and_quality_of_every_cell(tmp_path, capsys):
    step_caches.main(["--folder", str(tmp_path), "--steps", "6", "--manifest", "landscape16", "--repeats", "2",
                      "--budgets", "0.5", "--cells", "none,taylorseer_0.5,planned_0.5"])  # fmt: skip
    table, last = capsys.readouterr().out.split("\n\n")
    rows = {cells[1]: cells[2:-1] for line in table.splitlines()[2:] if (cells := line.replace(" ", "").split("|"))}
    assert rows["none"][:4] == ["1.00", "1.00(1.00to1.00)", "identical", "identical"]
    assert 0.4 < float(rows["planned_0.5"][0]) <= 0.55
    assert 15 < float(rows["planned_0.5"][2]) <= float(rows["planned_0.5"][3]) < 60
    assert set(rows) == {"none", "taylorseer_0.5", "planned_0.5"}
    assert last.startswith("A reused step takes ")
