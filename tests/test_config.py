"""Composition: who wins over whom, where each value came from, and which preset a request means."""

import json
from pathlib import Path

import pytest
import yaml

from sglang_gen.config import overrides, presets
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.config.schema import Run, get, leaves, plain

STEPS = "sampling.num_inference_steps"


def write(path: str, content: dict) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    header = "# @package _global_\n" if any(word in path for word in ("experiment", "model", "part")) else ""
    Path(path).write_text(json.dumps(content) if path.endswith("json") else header + yaml.safe_dump(content))
    return path


@pytest.fixture
def levels() -> dict[str, tuple[str, ...]]:
    """Words that set the number of steps on each level, lowest first."""
    write("own/experiment/mine.yaml", {"sampling": {"num_inference_steps": 9}})
    write("steps.json", {"num_inference_steps": 10})
    return {
        "default": ("--config-dir", "own", "--prompt", "x"),
        "preset": ("model=flux_dev",),
        "group": ("sampling=draft",),
        "experiment": ("experiment=mine",),
        "file": ("--config", "steps.json"),
        "override": (f"{STEPS}=11",),
    }


@pytest.mark.whole
def test_each_level_wins_over_those_below_it(composed, levels):
    seen, words = [], []
    for source in ("preset", "experiment", "file", "override"):
        words += levels[source]
        composition = composed(*levels["default"], *words)
        seen.append((get(composition.run, STEPS), composition.sources[STEPS]))
    assert seen == [(28, "preset"), (9, "experiment"), (10, "file"), (11, "override")]


@pytest.mark.parametrize(
    ("names", "value", "source"),
    [
        (("group",), 8, "group"),
        (("preset", "group"), 8, "group"),
        (("group", "experiment"), 9, "experiment"),
        (("group", "override"), 11, "override"),
        (("experiment", "override"), 11, "override"),
    ],
)
def test_a_group_file_stands_between_preset_and_experiment(composed, levels, names, value, source):
    composition = composed(*levels["default"], *(word for name in names for word in levels[name]))
    assert (get(composition.run, STEPS), composition.sources[STEPS]) == (value, source)


def test_a_flag_wins_like_an_override(composed, levels):
    words = [word for name in ("default", "preset", "group", "experiment", "file") for word in levels[name]]
    composition = composed(*words, "--num-inference-steps", "12")
    assert (get(composition.run, STEPS), composition.sources[STEPS]) == (12, "flag")


def test_nothing_said_is_the_schemas_default(composed):
    composition = composed("--model-path", "/some/folder", "--prompt", "x")
    assert composition.sources.keys() == leaves().keys()
    assert (get(composition.run, STEPS), composition.sources[STEPS]) == (50, "default")
    given = {path for path, source in composition.sources.items() if source not in ("default", "group")}
    assert given == {"model.path", "sampling.prompt", "model.preset"}
    expected = plain(Run())
    expected["model"]["path"], expected["sampling"]["prompt"] = "/some/folder", "x"
    assert plain(composition.run) == expected


def test_a_key_covers_what_lies_below_it_and_no_key_that_begins_alike():
    assert overrides.covers("sampling.prompt", "sampling.prompt")
    assert overrides.covers("backend.diffusers_kwargs", "backend.diffusers_kwargs.eta")
    assert not overrides.covers("sampling.prompt", "sampling.prompts_file")
    sources = compose(Choices(overrides=("model=sdxl", "sampling.prompt=a"))).sources
    assert (sources["sampling.prompt"], sources["sampling.prompts"]) == ("override", "default")


@pytest.mark.whole
def test_a_file_yields_to_an_override_of_the_path_and_of_the_group(composed):
    write("file.json", {"prompt": "f", "num_inference_steps": 3, "seed": 4, "num_gpus": 2})
    by_path = composed("model=sdxl", "--config", "file.json", f"{STEPS}=5")
    assert (get(by_path.run, STEPS), by_path.run.sampling.seed) == (5, 4)
    by_group = composed("model=sdxl", "--config", "file.json", "sampling=draft", "--prompt", "p")
    assert (get(by_group.run, STEPS), by_group.run.sampling.seed, by_group.run.parallel.num_gpus) == (8, None, 2)
    assert by_group.notices == (
        "Group options on the command line replace sampling.num_inference_steps, sampling.seed of file.json",
    )


def test_group_options_in_a_file(composed, sglang):
    write("file.yaml", {"model": "flux_dev", "sampling": "draft", "experiment": "quick_look", "parallel": "sp2"})
    composition = composed("--config", "file.yaml", "--prompt", "x")
    assert composition.run.model.preset == "flux_dev"
    assert (get(composition.run, STEPS), composition.run.sampling.num_samples) == (8, 4)
    assert composition.run.parallel.sp_degree == 2
    assert composed("--config", "file.yaml", "model=sdxl", "parallel=tp2").run.parallel.sp_degree is None
    write("file.yaml", {"model": "flux_dv"})
    done = sglang("generate", "--config", "file.yaml")
    assert (done.code, "did you mean 'flux_dev'?" in done.err) == (2, True)


def test_the_users_config_dir_is_searched_first(composed):
    write("own/sampling/draft.yaml", {"num_inference_steps": 3})
    write("own/model/mine.yaml", {"model": {"preset": "mine", "path": "me/my-model"}, "sampling": {"height": 64}})
    assert get(composed("--config-dir", "own", "model=sdxl", "sampling=draft").run, STEPS) == 3
    by_path = composed("--config-dir", "own", "--model-path", "/somewhere/My-Model", "--prompt", "x")
    assert (by_path.run.model.preset, by_path.run.sampling.height) == ("mine", 64)


def test_a_preset_of_the_user_takes_the_place_of_a_shipped_one_of_its_name():
    write("own/model/sdxl.yaml", {"model": {"preset": "sdxl", "path": "me/another-model"}})
    known = presets.load("own")
    assert [preset.path for preset in known if preset.name == "sdxl"] == ["me/another-model"]
    assert presets.by_path("/somewhere/another_model", known) == "sdxl"
    assert presets.by_path("stabilityai/stable-diffusion-xl-base-1.0", known) is None


def test_a_broken_preset_of_the_user_stops_only_who_chooses_it(composed, sglang):
    Path("own/model").mkdir(parents=True)
    Path("own/model/broken.yaml").write_bytes(b"\xff\xfe: [")
    Path("own/model/folder.yaml").mkdir()
    assert composed("--config-dir", "own", "--model-path", "/x", "--prompt", "x").run.model.path == "/x"
    done = sglang("generate", "--config-dir", "own", "model=broken", "--prompt", "x")
    assert done.code == 2
    assert len(done.lines) == 1


@pytest.mark.whole
def test_values_of_free_mappings_merge_key_by_key(composed):
    assert composed("model=qwen_image").run.backend.diffusers_kwargs == {"true_cfg_scale": 4.0}
    flag = composed("model=qwen_image", "--diffusers-kwargs", '{"eta": 1}')
    assert flag.run.backend.diffusers_kwargs == {"true_cfg_scale": 4.0, "eta": 1}
    write("file.json", {"diffusers_kwargs": {"eta": 1, "clip_skip": 2}})
    for word in ("backend.diffusers_kwargs.eta=3", "+backend.diffusers_kwargs.eta=3"):
        both = composed("model=qwen_image", "--config", "file.json", word)
        assert both.run.backend.diffusers_kwargs == {"true_cfg_scale": 4.0, "eta": 3, "clip_skip": 2}
    whole = composed("model=sdxl", "backend.diffusers_kwargs={eta: 0.5}")
    assert whole.run.backend.diffusers_kwargs == {"eta": 0.5}


def test_an_interpolation_sees_flags_and_file_values(composed):
    write("file.json", {"height": 640})
    assert composed("model=sdxl", "sampling.width=${sampling.height}").run.sampling.width == 1024
    assert composed("model=sdxl", "sampling.width=${sampling.height}", "--height", "512").run.sampling.width == 512
    assert (
        composed("model=sdxl", "sampling.width=${sampling.height}", "--config", "file.json").run.sampling.width == 640
    )


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        (("--model-path", "stabilityai/stable-diffusion-xl-base-1.0"), "sdxl"),
        (("model.path=stabilityai/stable-diffusion-xl-base-1.0",), "sdxl"),
        (("--model-path", "/data/stable-diffusion-xl-base-1.0/"), "sdxl"),
        (("--model-path", "someone/else"), None),
        (("--model-path", "/data/qwen", "--model-id", "Qwen-Image"), "qwen_image"),
        (("--model-path", "/data/qwen", "--model-id", "Qwen/Qwen-Image"), "qwen_image"),
        (("--model-id", "flux_dev"), "flux_dev"),
        (("model=sdxl", "--model-path", "/data/finetuned"), "sdxl"),
        (("model=sdxl", "--model-id", "sdxl"), "sdxl"),
        (("model.path=123",), None),
        ((), "landscape"),
    ],
)
def test_which_preset_a_request_means(composed, words, preset):
    assert composed(*words, "--prompt", "x").run.model.preset == preset


def test_settings_of_an_implied_preset_apply_and_are_announced(composed):
    composition = composed("--model-path", "/data/FLUX.1-dev", "--prompt", "x")
    assert (composition.run.model.path, composition.run.sampling.guidance_scale) == ("/data/FLUX.1-dev", 3.5)
    assert composition.notices == ("The settings of the preset 'flux_dev' apply to /data/FLUX.1-dev",)
    composition = composed("--model-id", "landscape", "--prompt", "x")
    assert composition.notices == ("No model given: using the embedded model 'landscape'",)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model-id", "qwen_imag"), "No preset is named 'qwen_imag'; did you mean 'qwen_image'?"),
        (("model.id=5",), "No preset is named '5'"),
        (("model=sdxl", "--model-id", "Qwen-Image"), "model=sdxl and the model id 'Qwen-Image' name two presets"),
        (("~model",), "No model is named"),
        (("model=custom",), "No model is named"),
        (("model.preset=sdxl",), "No model is named"),
    ],
)
def test_contradicting_models_are_refused(sglang, words, sentence):
    done = sglang("generate", *words, "--prompt", "x")
    assert (done.code, sentence in done.err) == (2, True)


def test_without_a_model_the_embedded_one_is_used_and_announced(composed):
    composition = composed("--prompt", "x")
    assert (composition.run.model.preset, composition.run.model.path) == ("landscape", None)
    assert composition.notices == ("No model given: using the embedded model 'landscape'",)
    assert composed("model=landscape", "--prompt", "x").notices == ()


@pytest.mark.whole
def test_the_example_prompt_needs_a_preset_by_name(composed, sglang):
    composition = composed("model=sdxl", "parallel=sp2_tp2")
    assert composition.run.sampling.prompt == composition.run.model.example_prompt
    assert composition.sources["sampling.prompt"] == "preset"
    assert composition.notices == ("No prompt given: using the example prompt of the preset 'sdxl'",)
    assert composed("model=sdxl", "--model-path", "/x").sources["sampling.prompt"] == "preset"
    write("model.yaml.json", {"model": "sdxl"})
    assert composed("--config", "model.yaml.json").sources["sampling.prompt"] == "preset"
    for words in ((), ("--model-path", "x/y"), ("--model-path", "stabilityai/stable-diffusion-xl-base-1.0"),
                  ("--model-id", "sdxl"), ("~model",)):  # fmt: skip
        done = sglang("generate", *words)
        assert done.code == 2, words
        assert done.lines[-1].startswith("ERROR: A prompt is needed: --prompt"), words


def test_prompts_from_a_file_need_no_prompt(composed):
    assert composed("--model-path", "x/y", "sampling.prompts_file=p.txt").run.sampling.prompt is None


def test_a_users_primary_configuration(composed, sglang):
    write("own/mine.yaml", {"defaults": ["config", {"override model": "sdxl"}, "_self_"], "sampling": {"seed": 5}})
    composition = composed("--config-dir", "own", "--config-name", "mine", "--prompt", "x")
    assert (composition.run.model.preset, composition.run.sampling.seed) == ("sdxl", 5)
    write("own/wrong.yaml", {"defaults": ["config", "_self_"], "sampling": {"sed": 5}})
    done = sglang("generate", "--config-dir", "own", "--config-name", "wrong", "--prompt", "x")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "sampling.sed: there is no such key; did you mean 'sampling.seed'?" in done.err


@pytest.mark.parametrize("name", ["mine", "config"])
def test_a_primary_configuration_without_defaults_builds_on_the_shipped_one(composed, name):
    """Also one that has the name of the shipped one."""
    write(f"own/{name}.yaml", {"sampling": {"seed": 5, "num_inference_steps": 3}, "dtype": "float32"})
    words = ("--config-dir", "own", "--config-name", name, "model=sdxl", "sampling.num_inference_steps=4")
    composition = composed(*words, "--prompt", "x")
    run = composition.run
    assert (run.model.preset, run.sampling.seed, get(run, STEPS), run.dtype.name) == ("sdxl", 5, 4, "float32")
    assert composition.sources["sampling.seed"] == "group"
    assert composition.sources[STEPS] == "override"


@pytest.mark.parametrize("defaults", [["config", "_self_"], ["/config", "_self_"], ["config", "part", "_self_"], None])
def test_a_primary_configuration_in_a_folder_is_that_of_a_run(composed, defaults):
    """Hydra would place its keys under the folder's name, and look for the shipped configuration in the folder."""
    write("own/inner/mine.yaml", {**({"defaults": defaults} if defaults else {}), "sampling": {"seed": 5}})
    write("own/inner/part.yaml", {"sampling": {"guidance_scale": 2.5}})
    write("own/model/mine.yaml", {"model": {"path": "x/y"}})
    composition = composed("--config-dir", "own", "--config-name", "inner/mine", "model=mine", "--prompt", "x")
    run = composition.run
    assert (run.sampling.seed, composition.sources["sampling.seed"]) == (5, "group")
    assert (run.sampling.guidance_scale == 2.5) is ("part" in (defaults or ()))


@pytest.mark.parametrize("name", ["./mine", "../own/mine", "/mine", ""])
def test_a_primary_configuration_outside_of_its_folder_is_refused(sglang, name):
    write("own/mine.yaml", {"sampling": {"seed": 5}})
    done = sglang("generate", "--config-dir", "own", "--config-name", name, "--prompt", "x")
    assert (done.code, len(done.lines)) == (2, 1)
    assert done.lines[0].startswith(f"ERROR: --config-name: '{name}' is not a name in a configuration folder")


@pytest.mark.whole
def test_a_sweep_file_without_defaults_sweeps(composed):
    write("own/inner/seeds.yaml", {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"sampling.seed": "1,2"}}}})
    jobs = composed("-m", "--config-dir", "own", "--config-name", "inner/seeds", "model=sdxl", "--output-path", "sweep")
    assert [job.run.sampling.seed for job in jobs] == [1, 2]


def test_a_defaults_list_that_leaves_the_shipped_configuration_out_is_refused(sglang):
    write("own/mine.yaml", {"defaults": [{"model": "sdxl"}, "_self_"], "sampling": {"seed": 5}})
    done = sglang("generate", "--config-dir", "own", "--config-name", "mine", "--prompt", "x")
    assert (done.code, done.lines) == (
        2, ["ERROR: The primary configuration does not build on 'config': put '- config' first in its defaults"],
    )  # fmt: skip


def test_a_wrong_key_of_a_primary_configuration_without_defaults_is_named(sglang):
    write("own/mine.yaml", {"sampling": {"sed": 5}})
    done = sglang("generate", "--config-dir", "own", "--config-name", "mine", "--prompt", "x")
    assert (done.code, done.lines) == (2, ["ERROR: sampling.sed: there is no such key; did you mean 'sampling.seed'?"])


@pytest.mark.whole
def test_a_folder_of_hydras_search_path(composed):
    write("more/sampling/tiny.yaml", {"num_inference_steps": 2})
    folder = f"hydra.searchpath=[file://{Path('more').absolute()}]"
    assert get(composed(folder, "model=sdxl", "sampling=tiny").run, STEPS) == 2
    jobs = composed("-m", folder, "model=sdxl", "sampling=tiny,draft", "--output-path", "sweep")
    assert [get(job.run, STEPS) for job in jobs] == [2, 8]


@pytest.mark.whole
def test_a_tilde_is_the_home_folder_in_every_setting_that_names_a_file(composed, sglang, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.json").write_text('{"perf_dump_path": "~/perf.json", "seed": 1, "cache_dit_config": "~/c.yaml"}')
    (tmp_path / "c.yaml").write_text("Fn_compute_blocks: 4")
    words = ["--config=~/x.json", "--prompt", "~/a", "--output-path=~/o", "sampling.latents='~/n.safetensors'"]
    run = composed(*words, "quality.reference='~/r'").run
    named = (run.output.path, run.output.perf_dump_path, run.sampling.latents, run.quality.reference)
    assert named == tuple(f"{tmp_path}/{name}" for name in ("o", "perf.json", "n.safetensors", "r"))
    assert (run.sampling.prompt, run.cache.cache_dit_config) == ("~/a", {"Fn_compute_blocks": 4})
    (job,) = composed("--prompt", "a", "--output-path=~/sweep", "-m", "sampling.seed=1")
    assert job.run.output.path == f"{tmp_path}/sweep/0"
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/mine.yaml").write_text("# @package _global_\nmodel: {preset: mine, path: ~/mine}\n")
    assert composed("--config-dir=~/conf", "model=mine", "--prompt", "a").run.model.path == f"{tmp_path}/mine"
    assert not any("~" in path.name for path in Path().iterdir())
