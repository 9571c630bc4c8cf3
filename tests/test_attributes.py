"""Attribute accuracy: what prompts name, what the classifier of a model finds, and where a run shows both."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sglang_gen import env
from sglang_gen.config import manifest
from sglang_gen.errors import UserError
from sglang_gen.perf import attributes, paired_quality
from sglang_gen.report.cell_metrics import Metrics
from sglang_gen.report.cell_table import _attributes as report_entry
from sglang_gen.report.conclusion import _properties
from sglang_gen.report.job_reader import Row
from sglang_gen.sweep import markdown
from sglang_gen.sweep.table import to_csv
from tools.landscape.captions import caption, full_caption
from tools.landscape.classifier import accuracy, vocabulary
from tools.landscape.data import draw
from tools.landscape.scene import ATTRIBUTES, sample_scene

FOLDER = env.embedded_model()
QUICK = ("--num-inference-steps", "2", "perf=light")
LAKE = {"prompt": "a lake at night, moon on the left", "seed": 1}


@pytest.fixture(scope="module")
def words() -> attributes.Vocabulary:
    return attributes.read_vocabulary(FOLDER / attributes.VOCABULARY_FILE)


def write(*entries: object, name: str = "prompts.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return name


def test_a_full_caption_names_all_its_attributes_and_no_caption_others_than_it_states(words):
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        assert words.named(full_caption(scene, rng)) == scene.__dict__
        text, mentions = (found := caption(scene, rng)).text, found.mentions
        stated = {name: value for name, value in scene.__dict__.items() if name in mentions}
        assert words.named(text).items() <= stated.items(), text  # filler words may stand within a phrase


@pytest.mark.parametrize("name", manifest.shipped())
def test_every_prompt_of_a_shipped_manifest_names_all_attributes(words, name):
    for entry in manifest.read(name).entries:
        assert words.named(entry["prompt"]).keys() == ATTRIBUTES.keys(), entry


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("A CLEAR   lake", {"water": "lake"}),
        ("a lake, clear sky", {"water": "lake", "sky": "clear"}),
        ("Trees and mountains by a river", {"water": "river"}),  # two terrains
        ("an anthill in the snow", {}),
        ("a portrait of a cat", {}),
        ("", {}),
    ],
)
def test_phrases_are_whole_words_and_an_attribute_with_two_values_is_left_out(words, prompt, named):
    assert words.named(prompt) == named


def test_the_vocabulary_in_the_package_is_that_of_the_captions():
    stored = json.loads((FOLDER / attributes.VOCABULARY_FILE).read_text(encoding="utf-8"))
    assert stored == vocabulary(stored["size"], stored["width"])


def test_the_classifier_in_the_package_is_small_and_states_how_it_was_made():
    path = FOLDER / attributes.CLASSIFIER_FILE
    assert path.stat().st_size < 2**20
    with safe_open(path, framework="pt") as file:
        facts, names = file.metadata(), list(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names if not name.endswith("num_batches_tracked")}
    assert kinds == {"F16"}
    assert json.loads(facts["attributes"]) == {name: list(values) for name, values in ATTRIBUTES.items()}
    assert min(json.loads(facts["held_out_accuracy"]).values()) >= 0.97
    assert facts["seed"] == "0"
    assert "tools.landscape.classifier" in facts["command"]


@pytest.mark.whole
def test_the_classifier_in_the_package_reaches_its_accuracy_on_fresh_renders():
    drawn = [draw(4321, index, 128) for index in range(40)]
    found = attributes.load(FOLDER).classes([image for _, image in drawn])
    assert min(accuracy(found, np.array([scene.labels() for scene, _ in drawn])).values()) >= 0.97


def test_images_of_another_size_are_resized():
    known = attributes.load(FOLDER)
    scene, image = draw(4321, 0, 128)
    large = np.repeat(np.repeat(image, 2, 0), 2, 1)
    assert known.find([image]) == known.find([large]) == [scene.__dict__]


class Answers(attributes.Attributes):
    """Finds what the value of an image's first pixel stands for."""

    def find(self, frames):
        return [{"water": ["lake", "river"][int(frame[0, 0, 0])], "time": "night"} for frame in frames]


def frame(water: int) -> np.ndarray:
    return np.full((16, 16, 3), water, np.uint8)


def entries(*prompts: str) -> list[dict]:
    return [{"index": index, "prompt": prompt, "seed": index} for index, prompt in enumerate(prompts)]


def test_accuracy_is_the_mean_over_images_and_counts_those_that_name_nothing(words):
    samples = entries("a lake at night", "a lake at noon", "a cat")
    judge = Answers(words, None)
    report = judge.measure(samples, [frame(0), frame(1), frame(0)], [frame(0), frame(0), frame(0)])
    assert report["attribute_accuracy"] == 0.5  # 2 of 2, 0 of 2
    assert report["reference_attribute_accuracy"] == 0.75
    assert report["attributes"] == {
        "images": 2,
        "left_out": 1,
        "by_attribute": {
            "time": {"images": 2, "accuracy": 0.5, "reference_accuracy": 0.5},
            "water": {"images": 2, "accuracy": 0.5, "reference_accuracy": 1.0},
        },
    }
    assert samples[1]["attributes"]["named"] == {"time": "noon", "water": "lake"}
    assert (samples[1]["attributes"]["found"]["water"], samples[2]["attribute_accuracy"]) == ("river", None)
    summary = attributes.summary(samples)
    assert (summary["images"], summary["mean"], summary["reference_mean"]) == (2, 0.5, 0.75)
    assert (summary["difference"], summary["difference_error"]) == (-0.25, 0.25)
    assert (summary["worst"]["index"], summary["worst"]["difference"]) == (1, -0.5)
    report["summary"] = {"attribute_accuracy": summary}
    assert attributes.sentence(report) == (
        "50 % ± 50, the reference 75 %, paired difference -25 ± 25 (1 image left out, whose prompts name none)"
    )


def test_prompts_that_name_nothing_have_no_accuracy_instead_of_zero(words):
    samples = entries("a cat", "a dog")
    report = Answers(words, None).measure(samples, [frame(0), frame(1)], None)
    report["summary"] = {"attribute_accuracy": attributes.summary(samples)}
    assert (report["attribute_accuracy"], report["attributes"]["images"]) == (None, 0)
    assert "reference_attribute_accuracy" not in report
    assert attributes.sentence(report).startswith("none, since no prompt names an attribute")


def test_the_accuracy_of_two_runs_is_compared_in_pairs(words):
    sides = []
    for waters in ((0, 0), (0, 1)):
        samples = entries("a lake at night", "a lake at night")
        Answers(words, None).measure(samples, [frame(water) for water in waters], None)
        sides.append(paired_quality.by_sample({"samples": samples}))
    (row,), notes = paired_quality.compare_quality(sides[:1], sides[1:])
    assert (row.measure, row.base, row.new, row.difference) == ("attribute_accuracy", 1.0, 0.75, -0.25)
    assert notes == []


def test_tables_and_reports_show_the_accuracy_beside_that_of_the_reference():
    quality = {"attribute_accuracy": 0.9125, "reference_attribute_accuracy": 0.975}
    rows = [Row("0", "completed", quality=quality), Row("1", "completed", quality={})]
    (column,) = (column for column in markdown._measured(rows) if column.header.startswith("attributes"))
    assert column.cells == ["91.25 / 97.50", ""]
    header, first, second = (line.split(",") for line in to_csv(rows).splitlines())
    assert header[-2:] == ["attribute_accuracy", "reference_attribute_accuracy"]
    assert (first[-2:], second[-2:]) == (["0.9125", "0.975"], ["", ""])
    one = Metrics(None, None, None, None, None, attributes=0.9125, reference_attributes=0.975)
    assert (report_entry(one).text, report_entry(one).interval) == ("91.25 %", "reference 97.5 %")
    assert _properties(one, None) == [
        "Its images show 91.25 % of the attributes that their prompts name, and those of the reference 97.5 %."
    ]


@pytest.mark.whole
def test_a_run_over_a_manifest_has_the_accuracy_in_dump_and_log(sglang):
    name = write(LAKE, {"prompt": "a cat", "seed": 2})
    words = ("generate", *QUICK, f"quality.manifest={name}")
    assert sglang(*words, "--output-path", "reference").code == 0
    done = sglang(*words, "quality.reference=reference", "--perf-dump-path", "perf.json")
    assert done.code == 0, done.err
    quality = json.loads(Path("perf.json").read_text())["quality"]
    assert quality["attribute_accuracy"] == quality["reference_attribute_accuracy"]
    assert quality["summary"]["attribute_accuracy"]["difference"] == 0.0
    assert (quality["attributes"]["images"], quality["attributes"]["left_out"]) == (1, 1)
    assert quality["attributes"]["by_attribute"].keys() == {"time", "water", "side"}
    (line,) = (line for line in done.lines if line.startswith("INFO: Quality, attribute accuracy: "))
    assert line.endswith("paired difference +0 (1 image left out, whose prompts name none)")


@pytest.mark.whole
def test_another_model_has_no_attribute_accuracy_until_its_folder_has_a_classifier(pipelines, sglang, tmp_path):
    model = shutil.copytree(pipelines["sd3"], tmp_path / "model")
    words = ("generate", "--model-path", str(model), *QUICK, "--height", "32", "--width", "32",
             f"quality.manifest={write(LAKE)}", "--perf-dump-path", "perf.json")  # fmt: skip
    assert sglang(*words).code == 0
    assert "attribute_accuracy" not in json.loads(Path("perf.json").read_text())["quality"]
    for file in (attributes.VOCABULARY_FILE, attributes.CLASSIFIER_FILE):
        shutil.copy(FOLDER / file, model)
    assert sglang(*words).code == 0
    assert json.loads(Path("perf.json").read_text())["quality"]["attributes"]["images"] == 1


def test_a_broken_classifier_is_refused_by_name_before_the_model_is_loaded(tmp_path):
    for file in (attributes.VOCABULARY_FILE, attributes.CLASSIFIER_FILE):
        shutil.copy(FOLDER / file, tmp_path)
    path = tmp_path / attributes.CLASSIFIER_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"attributes\.safetensors is not the classifier that attributes\.json beside"):
        attributes.load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"attributes\.safetensors is not the classifier .*; remove both files"):
        attributes.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "it is not valid JSON in line 1"),
        ("[]", "its layout is another"),
        ('{"size": 8, "width": 1, "attributes": {}}', "it has no phrases"),
        ('{"size": 0, "width": 1, "attributes": {"a": {"b": ["c"]}}}', "'size' or 'width' is not a positive integer"),
        ('{"size": 8, "width": 1, "attributes": {"a": {"b": ["c"], "d": ["C"]}}}', "the phrase 'C' names two values"),
    ],
)
def test_a_broken_vocabulary_is_refused_with_its_reason(tmp_path, content, reason):
    (tmp_path / attributes.VOCABULARY_FILE).write_text(content)
    with pytest.raises(UserError, match="is not the vocabulary of a classifier") as caught:
        attributes.load(tmp_path)
    assert reason in str(caught.value)


@pytest.mark.whole
def test_an_objective_that_the_model_cannot_have_is_refused_in_the_plan(pipelines, sglang):
    words = ("generate", f"quality.manifest={write(LAKE)}", "perf.objective=quality.attribute_accuracy", "dry_run=true")
    assert sglang(*words).code == 0
    done = sglang(*words, "--model-path", pipelines["sd3"])
    assert done.code == 2
    assert "'quality.attribute_accuracy' needs a classifier in the model's folder" in done.lines[-1]
    alone = sglang("generate", "--prompt", "a lake", *words[2:])
    assert "'quality.attribute_accuracy' needs quality.reference or quality.manifest" in alone.lines[-1]


def test_the_accuracy_cannot_be_named_as_a_further_measure(sglang):
    done = sglang("generate", "--prompt", "a", "quality.metrics=[attribute_accuracy]", "dry_run=true")
    assert (done.code, "is always measured for a model with attributes" in done.lines[-1]) == (2, True)


def test_a_black_image_scores_no_better_than_a_guess():
    found = attributes.load(FOLDER).find([np.zeros((128, 128, 3), np.uint8)])[0]
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(400)]
    hits = {name: np.mean([getattr(scene, name) == found[name] for scene in scenes]) for name in ATTRIBUTES}
    assert all(share < 1.4 / len(ATTRIBUTES[name]) for name, share in hits.items())


def test_the_training_of_a_classifier_gives_weights_in_float16(tmp_path):
    from tools.landscape import classifier

    drawn = [draw(1, index, 32) for index in range(8)]
    np.save(tmp_path / "pictures.npy", np.stack([image for _, image in drawn]))
    np.save(tmp_path / "labels.npy", np.array([scene.labels() for scene, _ in drawn], np.uint8))
    network = classifier.train(tmp_path, steps=3, batch=4, width=4, seed=0, device=torch.device("cpu"))
    weights = classifier.rounded(network)
    assert {value.dtype for value in weights.values()} == {torch.float16, torch.int64}
