"""`sglang tune cache`: what calibration measures, the command from end to end, and the requests that it refuses."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from native import picture, tensors
from plan_files import write
from whole import plan_of

from sglang_gen.backends.native import planned_request
from sglang_gen.perf import quality
from sglang_gen.tune import plan_calibration as calibration
from sglang_gen.tune.plan_bench import PlanBench
from sglang_gen.tune.plan_calibration import sources

FOUR_STEPS = "sampling.num_inference_steps=4"
SIZE = ("--height", "32", "--width", "32", "--dtype", "float32", "--seed", "7")


@pytest.fixture
def bench(pipelines):
    """A loaded pipeline of four steps, and the samples of a batch."""

    def load(name: str, *words: str) -> tuple[PlanBench, Any]:
        plan = plan_of(f"model.path={pipelines[name]}", "sampling.prompt=a cat", "sampling.num_samples=2",
                       "sampling.batch_size=2", FOUR_STEPS, *words)  # fmt: skip
        loaded, samples = PlanBench(plan), [sample for batch in plan.batches for sample in batch]
        with torch.no_grad():
            loaded.warm_up(samples[0])
        return loaded, samples

    return load


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd3", ()),
        pytest.param("sd3", ("sampling.guidance_batching=sequential",), marks=pytest.mark.slow),
        pytest.param("flux", (), marks=pytest.mark.slow),
        pytest.param("sd15", ("sampling.guidance_scale=3",), marks=pytest.mark.slow),
    ],
)
def test_the_error_of_the_last_step_is_that_of_a_run_which_reuses_it(bench, sglang, pipelines, name, words):
    """Nothing follows the last step, so the error after it is the error of the final latents."""
    loaded, samples = bench(name, *words)
    errors = loaded.calibrate(samples).errors
    for depth in loaded.depths:
        depths = [*[None] * (loaded.steps - 1), depth]  # PNDM evaluates the network once more than it has steps
        for folder, cache in (
            ("exact", ()),
            (f"reused{depth}", ("cache=planned", write(pipelines[name], depths, *words, FOUR_STEPS, blocks=20))),
        ):
            done = sglang("generate", "--model-path", pipelines[name], "--prompt", "a cat", *SIZE, "--num-samples", 2,
                          "sampling.batch_size=2", "--num-inference-steps", 4, "output.latents=true", *words, *cache,
                          "--output-path", folder)  # fmt: skip
            assert done.code == 0, done.err
        pairs = [(tensors("exact", row)["latents"], tensors(f"reused{depth}", row)["latents"]) for row in range(2)]
        measured = [float(((one - other) ** 2).sum() / (one**2).sum()) for one, other in pairs]
        assert errors[loaded.steps - 2, loaded.steps - 1, depth] == pytest.approx(sum(measured) / 2, rel=1e-3)


@pytest.mark.whole
def test_calibration_leaves_the_exact_images_and_the_loop_unchanged(bench):
    loaded, samples = bench("sd3")
    before = loaded.exact(loaded.batches(samples)).frames[0]
    errors = loaded.calibrate(samples).errors
    after = loaded.exact(loaded.batches(samples)).frames[0]
    assert (before == after).all()
    assert {step for _, step, _ in errors} == {1, 2, 3}
    assert all(value > 0 for value in errors.values())


@pytest.mark.whole
def test_the_gain_of_a_step_carries_its_error_to_the_end(bench, monkeypatch):
    """Measured with an error of the same size as that of the step, it gives the error of the final latents."""
    monkeypatch.setattr(calibration, "GAIN_ERROR", torch.inf)
    monkeypatch.setattr(calibration, "LARGEST_FACTOR", 1.0)
    loaded, samples = bench("sd3")
    (batch,) = loaded.batches(samples)
    errors = loaded.calibrate(samples).errors
    exact = loaded._generate(batch)
    depth = loaded.depths[-1]  # the gain is measured with the last source and depth
    for step in (1, 2, 3):
        loaded._use(None)
        exact = loaded._generate(batch)[0].latents.double()
        schedule = tuple(depth if each == step else None for each in range(4))
        loaded._use(planned_request.planned_chain(loaded.plan, schedule))
        moved = loaded._generate(batch)[0].latents.double()
        final = ((moved - exact).flatten(1).square().sum(1) / exact.flatten(1).square().sum(1)).mean()
        assert errors[step - 1, step, depth] == pytest.approx(float(final), rel=1e-3)


@pytest.mark.parametrize(
    ("step", "guided", "span", "found"),
    [
        (3, "1111", 8, [0, 1, 2]),
        (3, "1111", 2, [1, 2]),
        (3, "1011", 8, [2]),
        (2, "110", 8, []),
        (0, "1", 8, []),
    ],
)
def test_a_step_is_reused_from_near_steps_that_were_guided_alike(step, guided, span, found):
    assert sources(step, [each == "1" for each in guided], span) == found


REQUEST = ("sampling.prompts_file=prompts.txt", "--num-inference-steps", 6, *SIZE)


@pytest.fixture
def tune(sglang, pipelines):
    Path("prompts.txt").write_text("a cat\na dog\na lake\n")

    def run(*words: object, name: str = "sd3") -> Any:
        return sglang("tune", "cache", "--model-path", pipelines[name], *REQUEST, *words)

    return run


@pytest.mark.whole
def test_the_written_plan_makes_the_measured_images_with_the_printed_command(tune, sglang):
    done = tune("--budget", "0.7", "--output", "plan.json", "--calibration-prompts", 2)
    assert done.code == 0, done.err
    content = json.loads(Path("plan.json").read_text())
    assert content["computed_blocks"] <= 0.7 * 6 * 3
    assert (content["calibration"]["images"], content["measured"]["images"]) == (2, 1)
    command = shlex.split(done.out.splitlines()[-1].removeprefix("Use it: sglang "))
    assert command[-4:] == ["--prompt", "a lake", "--seed", "7"]
    for folder, words in (("planned", command), ("exact", [word for word in command if not word.startswith("cache")])):
        again = sglang(*words, "--output-path", folder)
        assert again.code == 0, again.err
    one, other = (picture(f"{folder}/generated_image_0.png").astype("uint8") for folder in ("planned", "exact"))
    assert quality.psnr(one, other) == pytest.approx(content["measured"]["worst_psnr"], abs=1e-3)
    assert any(line.endswith(" *") for line in done.out.splitlines())


@pytest.mark.whole
def test_an_interrupted_search_leaves_no_file(tune, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlanBench, "measure", interrupted)
    assert tune("--min-psnr", 20, "--output", "plan.json").code == 130
    assert [path.name for path in Path().iterdir()] == ["prompts.txt"]


@pytest.mark.slow
def test_a_bound_that_no_schedule_keeps_is_a_failure_and_leaves_no_file(tune):
    done = tune("--min-psnr", 100, "--output", "plan.json")
    assert (done.code, "No schedule keeps 100 dB for every image" in done.err) == (1, True), done.err
    assert "worst dB" in done.out
    assert not Path("plan.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "needs either --min-psnr, the PSNR that every image must keep, or --budget"),
        (("--budget", "0.5", "--min-psnr", "30"), "needs either --min-psnr"),
        (("--budget", "1.5"), "--budget: '1.5' is not a fraction above 0 and at most 1, such as 0.5"),
        (("--budget", "nan"), "--budget: 'nan' is not a fraction"),
        (("--min-psnr", "-3"), "--min-psnr: '-3' is not a number of dB between 0 and 100, such as 34"),
        (("--budget", "0.5", "--calibration-prompts", "0"), "--calibration-prompts: '0' is not a whole number of at"),
        (("--budget", "0.5", "--calibration-prompts", "3"), "--calibration-prompts is 3, and the request has 3"),
        (("--budget", "0.1"), "--budget is 0.1, and at least 1 of 6 steps have to be computed; give at least 0.167"),
        (("--budget", "0.3", "sampling.guidance_interval=[0,0.5]"), "at least 2 of 6 steps have to be computed"),
        (("--budget", "0.5", "cache=dbcache"), "calibrates a schedule from the exact run; leave out the settings of c"),
        (("--budget", "0.5", "parallel=tp2"), "calibrates on one rank, and the schedule holds for every layout"),
        (("--budget", "0.5", "compile=full"), "observes the blocks one by one, and the schedule holds with every"),
        (("--budget", "0.5", "dry_run=true"), "sglang tune cache has no dry run"),
        (("--budget", "0.5", "--cfg", "job"), "sglang tune cache decides itself what it runs; leave out --cfg"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_calibrated_is_refused_before_a_weight_is_read(tune, monkeypatch, words, sentence):
    monkeypatch.setattr(PlanBench, "__init__", None)
    done = tune(*words)
    assert (done.code, sentence in done.err) == (2, True), done.err


def test_one_prompt_is_refused(sglang):
    one = sglang("tune", "cache", "--budget", "0.5", "--prompt", "a")
    assert (one.code, "needs at least two: give sampling.prompts_file or quality.manifest" in one.err) == (2, True)


def test_settings_without_effect_are_warned_of(tune, monkeypatch):
    monkeypatch.setattr(PlanBench, "__init__", None)
    done = tune("--budget", "0.5", "--perf-dump-path", "perf.json")
    assert "WARNING: output.perf_dump_path has no effect on sglang tune cache" in done.err


@pytest.mark.slow
def test_the_embedded_model_keeps_the_bound_with_fewer_blocks(sglang):
    done = sglang("tune", "cache", "--min-psnr", 30, "quality.manifest=landscape16", "--num-inference-steps", 12,
                  "--height", 64, "--width", 64, "dtype=float32", "--calibration-prompts", 2,
                  "--output", "plan.json")  # fmt: skip
    assert done.code == 0, done.err
    content = json.loads(Path("plan.json").read_text())
    assert content["measured"]["worst_psnr"] >= 30
    assert content["computed_blocks"] < 0.8 * 12 * 7
