"""The run record: what it says, and that it repeats its run bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sglang_gen.files import PNG_KEY

SIZE = ("--height", "32", "--width", "32", "--num-inference-steps", "2")


def picture(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def record(path: str = "outputs/generated_image_0.json") -> dict:
    return json.loads(Path(path).read_text())


@pytest.fixture
def repeats(sglang):
    """Run, then run again from the record of the last picture alone; both runs' pictures must be the same."""

    def run(model: Path, *words: str) -> dict:
        first = sglang("generate", "--model-path", model, *SIZE, "--output-path", "first", *words)
        assert first.code == 0, first.err
        Path("prompts.txt").unlink(missing_ok=True)
        records = sorted(Path("first").glob("*.json"))
        again = sglang("generate", "--config", records[-1], "--output-path", "again")
        assert again.code == 0, again.err
        assert not any("WARNING: The record" in line for line in again.lines)
        for path in records:
            assert np.array_equal(picture(f"first/{path.stem}.png"), picture(f"again/{path.stem}.png"))
            assert record(f"again/{path.name}")["sample"] == record(f"first/{path.name}")["sample"]
        assert len(list(Path("again").glob("*.png"))) == len(records)
        return record(f"again/{records[-1].name}")

    return run


@pytest.mark.whole
def test_a_run_without_a_seed_repeats(repeats, pipelines, sglang):
    again = repeats(pipelines["sd15"], "--prompt", "a lake")
    assert again["run"]["sampling"]["seed"] == again["effective"]["seed"] == again["sample"]["seed"]
    other = sglang("generate", "--model-path", pipelines["sd15"], *SIZE, "--prompt", "a lake")
    assert other.code == 0
    assert record()["run"]["sampling"]["seed"] != again["run"]["sampling"]["seed"]


@pytest.mark.whole
def test_a_run_from_a_prompts_file_repeats_without_the_file(repeats, pipelines):
    Path("prompts.txt").write_text(
        'a red fox\n{"prompt": "b, {c}", "seed": 40, "negative_prompt": "night"}\na lake\n', encoding="utf-8"
    )
    again = repeats(pipelines["sd3"], "sampling.prompts_file=prompts.txt", "sampling.batch_size=2")
    assert [entry["prompt"] for entry in again["run"]["sampling"]["prompts"]] == ["a red fox", "b, {c}", "a lake"]
    assert again["run"]["sampling"]["prompts_file"] is None


def test_samples_in_batches_repeat(repeats, pipelines):
    again = repeats(pipelines["sdxl"], "--prompt", "a", "--num-samples", "3", "sampling.batch_size=2", "--seed", "5")
    assert again["sample"]["seed"] == 7
    assert again["run"]["sampling"]["batch_size"] == 2


@pytest.mark.whole
def test_a_run_in_the_automatic_dtype_is_pinned_to_the_dtype_it_took(repeats, pipelines, monkeypatch):
    monkeypatch.setenv("SGLANG_GEN_CPU_DTYPE", "bfloat16")
    again = repeats(pipelines["flux"], "--prompt", "a", "--seed", "3")
    assert again["effective"]["dtype"] == "bfloat16"
    assert again["run"]["dtype"] == "bfloat16"  # the first run's `auto`, which another machine would read differently
    assert again["sources"]["dtype"] == "file"
    assert record("first/generated_image_0.json")["requested"]["dtype"] == "auto"


def test_arguments_of_the_pipeline_and_the_negative_prompt_repeat(repeats, pipelines):
    kwargs = '{"clip_skip": 1, "use_karras_sigmas": true, "guidance_rescale": 0.5}'
    again = repeats(pipelines["sdxl"], "--prompt", "a", "--negative-prompt", 'b, "c"', "--guidance-scale", "3.5",
                    "--diffusers-kwargs", kwargs)  # fmt: skip
    assert again["run"]["backend"]["diffusers_kwargs"]["guidance_rescale"] == 0.5
    assert again["sample"]["negative_prompt"] == 'b, "c"'


@pytest.mark.whole
def test_a_repeat_with_one_change_takes_the_rest_from_the_record(pipelines, sglang):
    common = ("generate", "--model-path", pipelines["sd15"], *SIZE, "--dtype", "float32")
    assert sglang(*common, "--prompt", "a", "--seed", "9").code == 0
    done = sglang("generate", "--config", "outputs/generated_image_0.json", "--prompt", "b")
    assert done.code == 0, done.err
    changed = record("outputs/generated_image_1.json")
    assert (changed["sample"]["prompt"], changed["sample"]["seed"]) == ("b", 9)
    assert (changed["sources"]["sampling.prompt"], changed["sources"]["sampling.seed"]) == ("flag", "file")


def test_the_record_inside_a_picture_is_enough(pipelines, sglang):
    assert sglang("generate", "--model-path", pipelines["sd15"], *SIZE, "--prompt", "a").code == 0
    with Image.open("outputs/generated_image_0.png") as image:
        Path("kept.json").write_text(image.text[PNG_KEY])
    assert sglang("generate", "--config", "kept.json").code == 0
    assert np.array_equal(picture("outputs/generated_image_0.png"), picture("outputs/generated_image_1.png"))


@pytest.mark.whole
def test_a_repeat_from_another_picture_than_the_records_is_a_warning(pipelines, sglang):
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save("in.png")
        words = ("--model-path", pipelines["sd15"], *SIZE, "--prompt", "a", "--image-path", "in.png")
        again = ("--config", "outputs/generated_image_0.json")
        done = sglang("generate", *(words if color == "red" else again))
        assert done.code == 0, done.err
        changed = [line for line in done.lines if "is not the file that the record was made with" in line]
        assert changed == (["WARNING: --image-path: in.png is not the file that the record was made with"]
                           if color == "blue" else [])  # fmt: skip
    Image.new("RGB", (32, 32), "red").save("in.png")
    for words in (("outputs/generated_image_0.json",), ("outputs/generated_image_1.json", "--image-path", "in.png")):
        assert "is not the file" not in sglang("generate", "--config", *words).err


def test_other_versions_are_named_in_a_warning(pipelines, sglang):
    assert sglang("generate", "--model-path", pipelines["sd15"], *SIZE, "--prompt", "a").code == 0
    kept = record()
    here = kept["versions"]["torch"]
    kept["versions"] |= {"torch": "1.0.0", "diffusers": "0.1"}
    Path("kept.json").write_text(json.dumps(kept))
    done = sglang("generate", "--config", "kept.json")
    assert done.code == 0, done.err
    (warning,) = [line for line in done.lines if line.startswith("WARNING")]
    assert warning.startswith("WARNING: The record was made with other versions, so the result may differ: ")
    assert f"torch 1.0.0 (here {here})" in warning
    assert "diffusers 0.1 (here " in warning
    assert "numpy" not in warning


def test_the_record_says_what_was_asked_what_took_effect_and_why(pipelines, sglang):
    done = sglang("generate", "--model-path", pipelines["sdxl"], *SIZE, "--prompt", "a", "sampling.batch_size=1",
                  "--seed", "3")  # fmt: skip
    assert done.code == 0, done.err
    kept = record()
    assert set(kept) == {"schema_version", "file", "sample", "run", "sources", "requested", "effective", "inputs",
                         "versions", "commit_hash"}  # fmt: skip
    assert kept["schema_version"] == 1
    assert kept["sample"] == {"index": 0, "prompt": "a", "negative_prompt": None, "seed": 3}
    same = {"backend", "attention", "dtype", "device", "parallel", "cache", "quantization", "offload", "compile",
            "cuda_graphs"}  # fmt: skip
    assert same <= set(kept["requested"])
    assert same <= set(kept["effective"])
    assert (kept["requested"]["backend"], kept["effective"]["backend"]) == ("auto", "sglang")
    assert kept["effective"]["dtype"] in ("float32", "bfloat16")
    assert (kept["effective"]["height"], kept["effective"]["width"]) == (32, 32)
    assert kept["effective"]["pipeline"] == "StableDiffusionXLPipeline"
    assert kept["effective"]["components"]["scheduler"] == "EulerDiscreteScheduler"
    sources = kept["sources"]
    assert sources["sampling.seed"] == "flag"
    assert sources["sampling.batch_size"] == "override"
    assert sources["sampling.guidance_scale"] == "default"
    assert set(sources.values()) <= {"default", "preset", "group", "experiment", "file", "override", "flag"}


def test_the_configuration_file_of_the_page_runs(pipelines, sglang):
    Path("generation_config.json").write_text(
        json.dumps(
            {
                "model_path": str(pipelines["sdxl"]),
                "prompt": "A majestic dragon flying over mountains",
                "negative_prompt": "blurry, low quality",
                "num_inference_steps": 2,
                "guidance_scale": 7.5,
                "height": 32,
                "width": 64,
                "seed": 12345,
                "num_samples": 2,
            }
        )
    )
    done = sglang("generate", "--config", "generation_config.json")
    assert done.code == 0, done.err
    kept = record("outputs/generated_image_1.json")
    assert kept["sample"]["seed"] == 12346
    assert kept["sample"]["negative_prompt"] == "blurry, low quality"
    assert picture("outputs/generated_image_1.png").shape == (32, 64, 3)
    assert kept["sources"]["sampling.width"] == "file"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema_version": 99}, "is a record of schema version 99; this sglang-gen reads up to 1"),
        ({"run": None}, "it is not the record of a run"),
    ],
)
def test_a_record_that_cannot_be_read_says_why(pipelines, sglang, change, sentence):
    kept = {"schema_version": 1, "run": {"sampling": {"prompt": "a"}}} | change
    Path("kept.json").write_text(json.dumps(kept))
    done = sglang("generate", "--config", "kept.json")
    assert (done.code, len(done.lines)) == (2, 1)
    assert sentence in done.lines[0]


@pytest.mark.whole
def test_many_prompts_stand_once_beside_the_pictures_and_the_record_repeats_them(pipelines, sglang):
    texts = ["a lake", "b, {c} 山\u2028", *(f"{number} " + "long " * 2000 for number in range(2))]
    Path("prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    words = ("--model-path", pipelines["sd15"], "--height", "32", "--width", "32", "--num-inference-steps", "1")
    done = sglang("generate", *words, "--seed", "3", "sampling.prompts_file=prompts.txt")
    assert done.code == 0, done.err
    Path("prompts.txt").unlink()
    (kept,) = Path("outputs").glob("prompts_*.jsonl")
    for number, text in enumerate(texts):
        record = json.loads(Path(f"outputs/generated_image_{number}.json").read_text(encoding="utf-8"))
        assert record["sample"]["prompt"] == text
        assert (record["run"]["sampling"]["prompts"], record["run"]["sampling"]["prompts_file"]) == ([], kept.name)
    assert Path("outputs/generated_image_0.json").stat().st_size < 16_384

    again = sglang("generate", "--config", "outputs/generated_image_1.json")
    assert again.code == 0, again.err
    assert list(Path("outputs").glob("prompts_*.jsonl")) == [kept]
    for number in range(4):
        first, second = (Path(f"outputs/generated_image_{index}.png") for index in (number, number + 4))
        assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))

    kept.write_text(kept.read_text(encoding="utf-8").replace("lake", "sea"), encoding="utf-8")
    changed = sglang("generate", "--config", "outputs/generated_image_1.json")
    assert (changed.code, "does not hold the prompts of" in changed.lines[-1]) == (2, True)
    kept.unlink()
    gone = sglang("generate", "--config", "outputs/generated_image_1.json")
    assert (gone.code, "cannot be read from" in gone.lines[-1]) == (2, True)
