"""`sglang perf compare --across`: which recipes are compared, what may differ, and what the report says of it."""

import json
from pathlib import Path

import pytest

from sglang_gen.config.schema import leaves
from sglang_gen.errors import UserError
from sglang_gen.perf import command
from sglang_gen.perf.dump_reader import collect
from sglang_gen.perf.recipe import _FIELDS, fields_of, flat

FIELDS = {"steps": 4, "size": [128, 128], "dtype": "float32", "cache": "none", "parallel": {"tp": 1, "ring": 1},
          "hardware": ["EPYC", 2, 2]}  # fmt: skip
CACHE = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.08}


def save(place: str, factor: float = 1.0, repeats: int = 3, **changes: object) -> str:
    fields = {**FIELDS, **changes}
    times = [
        {"total_duration_ms": 1000 * factor * (1 + index / 1000), "steps": [], "denoise_steps_ms": [100.0 * factor]}
        for index in range(repeats)
    ]
    dump = {**times[0], "schema_version": 1, "repeats": times, "meta": {"prompt": "a lake", "model": "landscape"},
            "samples": [{}], "fingerprint": {"hash": json.dumps(fields), "fields": fields}}  # fmt: skip
    Path(place).mkdir(parents=True)
    (Path(place) / "perf.json").write_text(json.dumps(dump))
    return place


def perf(*argv: str) -> tuple[int, dict]:
    code = command.main(["compare", *argv, "--json", "report.json"])
    return code, json.loads(Path("report.json").read_text())


def layout(tp: int) -> dict[str, object]:
    """Ranks of a CPU share its cores, so the number of threads of each follows from the layout."""
    return {"parallel": {"tp": tp, "ring": 1}, "hardware": ["EPYC", 2, 2 // tp]}


def test_recipes_that_differ_in_the_key_are_compared_and_the_report_says_in_what(capsys):
    save("one")
    save("two", 0.5, **layout(2))
    code, report = perf("--across", "parallel", "one", "two")
    assert (code, report["verdict"], report["across"]) == (0, "IMPROVEMENT", ["parallel"])
    (found,) = report["comparisons"]
    assert found["differences"] == []
    assert found["across"] == [
        {"field": "parallel.tp", "base": 1, "new": 2},
        {"field": "hardware.threads", "base": 2, "new": 1},
    ]
    out = capsys.readouterr().out
    assert "two/perf.json against one/perf.json.\nThey differ in parallel.tp 1 → 2; hardware.threads 2 → 1.\n" in out
    assert perf("one", "two")[0] == 3
    assert "- to compare them nevertheless: --across parallel\n" in capsys.readouterr().out


def test_a_difference_in_another_key_stays_a_mismatch_that_names_it(capsys):
    save("one")
    save("two", 0.5, **layout(2), dtype="bfloat16")
    code, report = perf("--across", "parallel", "one", "two")
    assert (code, report["verdict"]) == (3, "RECIPE_MISMATCH")
    assert report["comparisons"][0]["differences"] == [{"field": "dtype", "base": "float32", "new": "bfloat16"}]
    assert "--across parallel,dtype\n" in capsys.readouterr().out
    assert perf("--across", "dtype,parallel", "one", "two")[0] == 0
    save("other", 0.5, parallel={"tp": 2, "ring": 1}, hardware=["Xeon", 2, 2])
    (found,) = perf("--across", "parallel", "one", "other")[1]["comparisons"]
    assert [item["field"] for item in found["differences"]] == ["hardware.device"]


def test_a_key_that_is_the_same_on_both_sides_is_noted(capsys):
    save("one")
    save("two", **layout(2))
    assert perf("--across", "cache,parallel", "one", "two")[0] == 0
    assert "- cache is the same on both sides\n" in capsys.readouterr().out
    save("three")
    assert perf("--across", "cache", "one", "three")[0] == 0
    assert "They have one recipe." in capsys.readouterr().out


def test_the_jobs_of_a_folder_are_compared_with_its_first_one(capsys):
    for job, tp in {"2": 2, "10": 4, "0": 1}.items():
        save(f"sweep/{job}", tp**-0.5, parallel={"tp": tp, "ring": 1})
    code, report = perf("--across", "parallel.tp_size", "sweep")
    assert code == 0
    assert [item["base_files"] + item["new_files"] for item in report["comparisons"]] == [
        ["sweep/0/perf.json", "sweep/2/perf.json"],
        ["sweep/0/perf.json", "sweep/10/perf.json"],
    ]
    assert report["base_without_new"] == []


def test_jobs_of_a_folder_that_differ_in_other_keys_are_compared_among_themselves():
    for job, (tp, steps) in enumerate([(1, 4), (1, 8), (2, 4), (2, 8), (1, 16)]):
        save(f"sweep/{job}", **layout(tp), steps=steps)
    code, report = perf("--across", "parallel", "sweep")
    assert code == 0
    assert [item["base_files"] + item["new_files"] for item in report["comparisons"]] == [
        ["sweep/0/perf.json", "sweep/2/perf.json"],
        ["sweep/1/perf.json", "sweep/3/perf.json"],
    ]
    assert report["base_without_new"] == ["sweep/4/perf.json"]


def test_a_folder_without_any_such_pair_is_a_mismatch():
    save("sweep/0")
    save("sweep/1", steps=8)
    code, report = perf("--across", "parallel", "sweep")
    assert (code, report["verdict"]) == (3, "RECIPE_MISMATCH")
    assert report["comparisons"][0]["differences"] == [{"field": "steps", "base": 4, "new": 8}]
    assert report["base_without_new"] == []


def test_the_same_recipe_is_preferred_and_several_others_are_ambiguous():
    for side in ("base", "new"):
        for job, tp in enumerate((1, 2)):
            save(f"{side}/{job}", **layout(tp))
    _, report = perf("--across", "parallel", "base", "new")
    assert [item["across"] for item in report["comparisons"]] == [[], []]
    save("third", parallel={"tp": 4, "ring": 1}, hardware=["EPYC", 2, 1])
    with pytest.raises(
        UserError, match=r"third/perf.json fits several recipes of the base, since they differ in parallel"
    ):
        command.main(["compare", "--across", "parallel", "base", "third"])


def test_a_cache_is_shown_as_a_whole_and_its_median_step_is_explained(capsys):
    save("none")
    save("cached", 0.6, cache=CACHE)
    save("bolder", 0.5, cache=CACHE | {"residual_diff_threshold": 0.3})
    assert perf("--across", "cache", "none", "cached")[0] == 0
    out = capsys.readouterr().out
    assert "They differ in cache none → Fn_compute_blocks 1, residual_diff_threshold 0.08.\n" in out
    assert "stage.denoising has all steps" in out
    assert perf("--across", "cache.residual_diff_threshold", "cached", "bolder")[0] == 0
    assert "They differ in cache.residual_diff_threshold 0.08 → 0.3.\n" in capsys.readouterr().out
    assert perf("--across", "cache.Fn_compute_blocks", "cached", "bolder")[0] == 3


def test_single_states_the_ratio_alone(capsys):
    save("one", repeats=2)
    save("two", 1.05, repeats=2)
    code, report = perf("--single", "one", "two")
    assert (code, report["verdict"], report["single"]) == (1, "REGRESSION", True)
    rows = report["comparisons"][0]["rows"]
    assert all((row["interval"], row["repeats_needed"], row["verdict"]) == (None, None, "REGRESSION") for row in rows)
    assert "--single: the ratios alone were compared with the tolerances" in capsys.readouterr().out


def test_every_key_of_the_table_is_a_config_path_or_group_and_every_field_is_one_of_a_dump():
    groups = {path.partition(".")[0] for path in leaves()}
    assert set(_FIELDS) <= set(leaves()) | groups
    known = {"attention", "backend", "batches", "cache", "compile", "components", "cuda_graphs", "denoising_steps",
             "device", "deterministic", "diffusers_kwargs", "dtype", "guidance_batching", "guidance_interval", "guided",
             "hardware", "input_picture", "latents_saved", "max_sequence_length", "model", "networks", "num_frames",
             "offload", "parallel", "pipeline", "quantization", "size", "steps", "true_cfg",
             "warmup_steps"}  # fmt: skip
    assert {field.partition(".")[0] for fields in _FIELDS.values() for field in fields} == known


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("parallel.sp_degree", ("parallel", "hardware.threads")),
        ("attention.backend", ("attention",)),
        ("cache.method", ("cache",)),
        ("cache.max_warmup_steps", ("cache.max_warmup_steps",)),
        ("quant.method", ("quantization", "components")),
        ("hardware", ("hardware",)),
        ("hardware.threads", ("hardware.threads",)),
    ],
)
def test_a_config_path_decides_fields_of_a_recipe_and_a_field_is_itself(key, fields):
    assert fields_of([key], collect([save("one")])) == {key: fields}


def test_the_entries_of_the_hardware_have_names():
    assert flat({"hardware": ["EPYC", 2, 1]}) == {
        "hardware.device": "EPYC",
        "hardware.cpu_count": 2,
        "hardware.threads": 1,
    }
    assert flat({"hardware": ["EPYC"]}) == {"hardware": ["EPYC"]}
