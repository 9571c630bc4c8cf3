"""Prompt manifests: the samples of a run, what excludes them, their digest, and a repeated record."""

import json
from pathlib import Path

import pytest

from sglang_gen.config import manifest, prompts
from sglang_gen.config.schema import Quality, Run, Sampling
from sglang_gen.errors import UserError
from sglang_gen.plan import quality_request
from tools.landscape.manifest import LENGTHS, lines

FOX, LAKE = {"prompt": "a fox", "seed": 9, "negative_prompt": "grey"}, {"prompt": "a lake"}
QUICK = ("--num-inference-steps", "1", "--height", "32", "--width", "32", "perf=light")


def write(*entries: object, name: str = "two.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return name


def samples(name: str, **sampling: object) -> list[tuple[str, str | None, int]]:
    run = Run(sampling=Sampling(**sampling), quality=Quality(manifest=name))
    pinned = prompts.pin(manifest.pin(run))
    return [(sample.prompt, sample.negative_prompt, sample.seed) for sample in prompts.samples(pinned)]


def test_a_manifest_decides_prompts_negative_prompts_and_seeds():
    assert samples(write(FOX, LAKE)) == [("a fox", "grey", 9), ("a lake", None, 1)]


def test_a_line_without_a_seed_has_the_runs_seed_plus_its_index():
    assert samples(write(FOX, LAKE), seed=40, negative_prompt="dull") == [("a fox", "grey", 9), ("a lake", "dull", 41)]


@pytest.mark.parametrize("count", LENGTHS)
def test_the_manifests_of_the_package_are_those_of_the_tool(count):
    path = manifest.SHIPPED / f"landscape{count}.jsonl"
    assert path.read_text(encoding="utf-8").splitlines() == lines(count)
    found = samples(path.stem)
    assert len(set(found)) == count
    assert found[:16] == samples("landscape16")
    assert manifest.read(path.stem).digest == manifest.read(str(path)).digest


def test_the_digest_depends_on_the_samples_and_not_on_the_layout_of_the_file():
    first = manifest.read(write(FOX, LAKE)).digest
    Path("other.jsonl").write_text('\n{"seed":9,  "negative_prompt": "grey", "prompt": "a fox"}\n{"prompt":"a lake"}')
    assert manifest.read("other.jsonl").digest == first
    digests = {
        manifest.read(write(*entries)).digest
        for entries in ((FOX,), (LAKE, FOX), (FOX, LAKE | {"seed": 1}), (FOX | {"seed": 8}, LAKE))
    }
    assert len(digests | {first}) == 5


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a lake\n", "quality.manifest: m.jsonl, line 1 is not valid JSON"),
        ('["a lake"]\n', "quality.manifest: m.jsonl, line 1 is not a JSON object"),
        ('{"prompt": "a"}\n{"promt": "b"}\n', "line 2: A prompt has the unknown key 'promt'; did you mean 'prompt'?"),
        ('{"prompt": "a", "seed": "1"}\n', "line 1: A prompt's 'seed' is '1'; it must be an integer"),
        ('{"seed": 1}\n', "line 1: A prompt entry has no 'prompt'"),
        ("\n", "quality.manifest: m.jsonl holds no prompt"),
        ('{"prompt": "a", "seed": 1}\n{"prompt": "a"}\n', "m.jsonl has one sample twice, in its prompts 1 and 2"),
    ],
)
def test_a_broken_manifest_is_refused_with_its_line(sglang, content, sentence):
    Path("m.jsonl").write_text(content)
    done = sglang("generate", "quality.manifest=m.jsonl", "dry_run=true")
    assert (done.code, sentence in done.lines[-1]) == (2, True), done.err


def test_an_unknown_name_is_refused_with_those_of_the_package():
    with pytest.raises(UserError, match=r"did you mean 'landscape16'\? .*package: landscape16, landscape64\)"):
        manifest.read("landscape_16")
    Path("folder").mkdir()
    with pytest.raises(UserError, match="folder is not a regular file"):
        manifest.read("folder")


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("--prompt", "a fox"), "sampling.prompt"),
        (("sampling.prompts=[{prompt: a}]",), "sampling.prompts"),
        (("sampling.prompts_file=two.jsonl",), "sampling.prompts_file"),
        (("sampling.num_samples=2",), "sampling.num_samples"),
        (("--num-samples", "1"), "sampling.num_samples"),
    ],
)
def test_other_settings_that_decide_samples_are_refused_by_name(sglang, words, path):
    write(FOX, LAKE)
    done = sglang("generate", "quality.manifest=two.jsonl", *words, "dry_run=true")
    assert done.lines[-1] == (
        f"ERROR: quality.manifest decides the samples of the run, and {path} is set too; leave one of the two out"
    )
    assert done.code == 2


@pytest.mark.parametrize(
    ("entries", "gave", "warned"), [((FOX,), True, True), ((FOX,), False, False), ((FOX, LAKE), True, False)]
)
def test_a_seed_that_no_sample_has_is_a_warning(entries, gave, warned):
    found = quality_request.seed_warnings(Run(quality=Quality(manifest=write(*entries))), gave)
    assert found == ["--seed has no effect: every line of quality.manifest=two.jsonl has a seed"] * warned


def test_random_weights_and_video_have_no_quality(sglang):
    write(FOX)
    done = sglang("generate", "quality.manifest=two.jsonl", "model.weights=random", "dry_run=true")
    assert "quality.manifest is for the quality of images, and these are noise" in done.lines[-1]
    video = sglang("generate", "quality.manifest=two.jsonl", "model=wan21_t2v_1_3b", "dry_run=true")
    assert "quality.manifest is for the quality of images, and WanPipeline makes video" in video.lines[-1]
    assert (done.code, video.code) == (2, 2)


@pytest.mark.whole
def test_the_digest_is_in_dump_and_record_and_a_record_repeats_the_manifest(pipelines, sglang):
    name = write(FOX, LAKE)
    words = ("--model-path", pipelines["sd3"], *QUICK)
    done = sglang("generate", *words, f"quality.manifest={name}", "--perf-dump-path", "perf.json")
    assert done.code == 0, done.err
    assert "Seed:" not in done.err
    dump, digest = json.loads(Path("perf.json").read_text()), manifest.read(name).digest
    assert dump["quality"]["manifest"] == {"name": name, "digest": digest, "samples": 2}
    assert (dump["quality"]["verdict"], dump["quality"]["reference"]) == (None, None)
    record = json.loads(Path("outputs/generated_image_1.json").read_text())
    assert (record["inputs"], record["sample"]["seed"]) == ({"quality.manifest": digest}, 1)
    again = sglang("generate", "--config", "outputs/generated_image_1.json", "--output-path", "again")
    assert again.code == 0, again.err
    assert (
        Path("again/generated_image_1.png").read_bytes()[-200:]
        == Path("outputs/generated_image_1.png").read_bytes()[-200:]
    )
    write(LAKE, FOX)
    changed = sglang("generate", "--config", "outputs/generated_image_1.json", "dry_run=true")
    assert (changed.code, "are not those of two.jsonl, which has changed since" in changed.lines[-1]) == (2, True)


@pytest.mark.whole
def test_a_reference_of_another_manifest_is_refused_by_name(pipelines, sglang):
    words = ("generate", "--model-path", pipelines["sd3"], *QUICK)
    assert sglang(*words, f"quality.manifest={write(FOX, LAKE)}", "--output-path", "reference").code == 0
    more = ("quality.reference=reference", "dry_run=true")
    other = sglang(*words, f"quality.manifest={write(FOX, name='one.jsonl')}", *more)
    digests = [manifest.read(name).digest[:12] for name in ("two.jsonl", "one.jsonl")]
    assert other.lines[-1] == (
        "ERROR: quality.reference: the images in reference were made with the manifest two.jsonl (digest "
        f"{digests[0]}), and this run has one.jsonl (digest {digests[1]}); name a run with the same manifest"
    )
    assert other.code == 2
    assert sglang(*words, "quality.manifest=two.jsonl", *more).code == 0
    assert sglang(*words, "--prompt", "a lake", "--seed", "1", *more).code == 0
