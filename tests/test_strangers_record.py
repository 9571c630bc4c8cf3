"""A run record may come from a stranger: it repeats a picture, and neither runs code nor chooses where files go."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from diffusers.utils import dynamic_modules_utils

from sglang_gen import Result, generate
from sglang_gen.config import prompt_archive
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.errors import UserError

SMALL = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 1, "seed": 7}
CODE = """
from pathlib import Path
import diffusers
Path({trace!r}).write_text("ran")
class OwnPipeline(diffusers.StableDiffusionPipeline):
    pass
"""


@pytest.fixture
def trace(tmp_path) -> Path:
    """The file that the repository's code leaves behind when it runs."""
    return tmp_path / "trace"


@pytest.fixture
def repository(pipelines, tmp_path, trace, monkeypatch) -> Path:
    """The tiny SD 1.5 with a pipeline class of its own."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(pipelines["sd15"], tmp_path / "own")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["own_pipeline", "OwnPipeline"]}))
    (folder / "own_pipeline.py").write_text(CODE.format(trace=str(trace)))
    return folder


def record(name: str = "record.json", sources: dict | None = None, **run: object) -> str:
    content = {"schema_version": 1, "run": {"sampling": SMALL, **run}, "sources": sources or {}, "effective": {}}
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
    return name


def trusting(repository: Path) -> dict:
    return {"path": str(repository), "trust_remote_code": True}


@pytest.mark.parametrize("more", [(), ("dry_run=true",), ("-m", "sampling.guidance_scale=1,2")])
@pytest.mark.parametrize("name", ["record.json", "my_settings.yaml", "x.YML"])
def test_a_record_does_not_allow_code_whatever_its_name(sglang, repository, trace, name, more):
    Path("record.json").unlink(missing_ok=True)
    path = record(name, model=trusting(repository))
    done = sglang("generate", "--config", path, *more)
    assert done.code == 2, done.err
    sentence = (
        f"{path} is a run record with model.trust_remote_code: true, and a record does not allow code by itself: "
        f"read the code of {repository}, then add --trust-remote-code"
    )
    assert sentence in done.err
    with pytest.raises(UserError, match="a record does not allow code by itself"):
        generate(config=path)
    assert not trace.exists()


@pytest.mark.parametrize("flag", ["--trust-remote-code", "model.trust_remote_code=true"])
def test_the_command_line_allows_the_code_of_a_record_and_the_log_names_it(sglang, repository, trace, flag):
    done = sglang("generate", "--config", record(model=trusting(repository)), flag)
    assert done.code == 0, done.err
    said = f"INFO: {repository} runs code from its repository (own_pipeline.py), allowed by --trust-remote-code"
    assert done.lines.count(said) == 1
    assert trace.read_text() == "ran"


def test_a_record_whose_model_is_replaced_allows_nothing(sglang, pipelines, repository, trace):
    path = record(model={"path": str(pipelines["sd15"]), "trust_remote_code": True})
    assert sglang("generate", "--config", path, "--model-path", repository).code == 2
    assert sglang("generate", "--config", path, "--no-trust-remote-code").code == 0
    assert not trace.exists()


@pytest.mark.parametrize("gone", ["schema_version", "run"])
def test_a_record_that_was_cut_is_no_configuration_file(sglang, repository, trace, gone):
    content = json.loads(Path(record(model=trusting(repository))).read_text())
    del content[gone]
    Path("cut.yaml").write_text(yaml.safe_dump(content))
    done = sglang("generate", "--config", "cut.yaml")
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert not trace.exists()


def test_a_configuration_file_may_allow_code_and_a_warning_names_the_folder(sglang, repository, trace):
    Path("mine.yaml").write_text(yaml.safe_dump({**SMALL, "model_path": str(repository), "trust_remote_code": True}))
    said = (
        f"WARNING: {repository} runs code from its repository (own_pipeline.py), allowed by model.trust_remote_code "
        "of the configuration file"
    )
    for more in (("dry_run=true",), ()):
        done = sglang("generate", "--config", "mine.yaml", *more)
        assert done.code == 0, done.err
        assert done.lines.count(said) == 1
    assert trace.read_text() == "ran"


def test_a_preset_of_the_users_may_allow_code_and_a_warning_names_the_folder(sglang, repository, trace):
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/own.yaml").write_text(yaml.safe_dump(trusting(repository)))
    words = [f"sampling.{name}={value}" for name, value in SMALL.items()]
    done = sglang("generate", "--config-dir", "conf", "model=own", *words)
    assert done.code == 0, done.err
    assert f"WARNING: {repository} runs code from its repository (own_pipeline.py), allowed by model.trust" in done.err
    assert trace.read_text() == "ran"


@pytest.mark.whole
@pytest.mark.parametrize("folder", ["{tmp}/elsewhere", "../elsewhere", "~/elsewhere", "link/elsewhere"])
def test_a_record_does_not_choose_a_folder_outside(sglang, pipelines, tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("link").symlink_to(tmp_path)
    folder = folder.format(tmp=tmp_path)
    path = record(model={"path": str(pipelines["sd15"])}, output={"path": folder}, sources={"output.path": "flag"})
    done = sglang("generate", "--config", path)
    assert done.code == 0, done.err
    assert (
        f"WARNING: output.path={folder} of record.json is not used: it lies outside the working directory and the "
        "folder of the record; give it again to write there"
    ) in done.lines
    assert Path("outputs/generated_image_0.png").exists()
    assert not list(tmp_path.rglob("generated*"))
    assert sglang("generate", "--config", path, "--output-path", folder).code == 0
    assert Path(folder).expanduser().joinpath("generated_image_0.png").exists()


@pytest.mark.parametrize("folder", ["mine/below", "{tmp}/kept", "{tmp}/kept/0"])
def test_a_record_repeats_into_the_folder_that_holds_it_or_a_folder_below_the_working_directory(tmp_path, folder):
    folder = folder.format(tmp=tmp_path)
    path = record(f"{tmp_path}/kept/record.json", output={"path": folder}, sources={"output.path": "flag"})
    composed = compose(Choices(file=path))
    assert (composed.run.output.path, composed.warnings) == (folder, ())


def test_a_record_neither_tells_anybody_nor_silences_the_log_nor_names_a_dump(sglang, pipelines, tmp_path):
    path = record(
        model={"path": str(pipelines["sd15"])}, log_level="error",
        tracking={"name": "wandb", "project": "theirs"},
        output={"perf_dump_path": str(tmp_path / "perf.json")},
        offload={"dit_layerwise_offload": True, "disk_path": str(tmp_path / "disk")},
    )  # fmt: skip
    done = sglang("generate", "--config", path)
    assert done.code == 0, done.err
    assert (
        "WARNING: tracking=wandb of record.json is not used: a record does not start a tracker; "
        "add tracking=wandb to use it"
    ) in done.lines
    assert f"WARNING: offload.disk_path={tmp_path / 'disk'} of record.json is not used: it lies outside" in done.err
    assert sorted(os.listdir("outputs")) == ["generated_image_0.json", "generated_image_0.png"]
    assert not [name for name in os.listdir(tmp_path) if name != "work0"]
    again = compose(Choices(("tracking=csv", "log_level=error"), file=path))
    assert (again.run.tracking.name.name, again.run.log_level.name) == ("csv", "error")
    assert not [warning for warning in again.warnings if "tracking" in warning]


@pytest.mark.parametrize("group", ["offload", "tracking", "output", "experiment"])
def test_a_record_chooses_no_options_that_could_set_what_it_cannot_decide(group):
    with pytest.raises(UserError, match=f"'{group}' of the record's run is not a mapping"):
        compose(Choices(file=record(**{group: "mine"})))


def test_prompts_of_a_record_are_a_file_beside_it_and_nothing_else(tmp_path):
    os.mkfifo(tmp_path / "prompts_0123456789abcdef.jsonl")
    for name in ("/dev/zero", "../prompts_0123456789abcdef.jsonl", str(tmp_path / "prompts_0123456789abcdef.jsonl")):
        with pytest.raises(UserError, match=r"must be a prompts_<hash>\.jsonl in the folder of the record"):
            prompt_archive.beside(tmp_path / "record.json", name)
    with pytest.raises(UserError, match="it is not a file"):  # and not waited for
        prompt_archive.beside(tmp_path / "record.json", "prompts_0123456789abcdef.jsonl")


TEXT = "${oc.env:SECRET} ${oc.decode:x} ${hydra:runtime.cwd} ${sampling.seed} ???"


def test_interpolations_in_a_record_are_text(monkeypatch, pipelines):
    monkeypatch.setenv("SECRET", "told")
    kept = {**SMALL, "prompt": TEXT, "negative_prompt": TEXT}
    path = record(
        sampling=kept, model={"path": str(pipelines["sd15"]), "component_paths": {"vae": "${oc.env:SECRET}"}},
        output={"path": "${oc.env:SECRET}"}, sources={"output.path": "flag"},
        backend={"diffusers_kwargs": {"x": ["${oc.env:SECRET}"]}},
    )  # fmt: skip
    run = compose(Choices(file=path)).run
    assert (run.sampling.prompt, run.sampling.negative_prompt) == (TEXT, TEXT)
    assert run.output.path == run.model.component_paths["vae"] == "${oc.env:SECRET}"
    assert run.backend.diffusers_kwargs == {"x": ["${oc.env:SECRET}"]}


@pytest.mark.parametrize("folder", ["${oc.env:SECRET}", "a/${x"])
def test_the_folder_of_a_sweep_is_no_interpolation(sglang, monkeypatch, folder):
    monkeypatch.setenv("SECRET", "told")
    path = record(output={"path": folder}, sources={"output.path": "flag"})
    for given in (("--config", path), ("--output-path", folder)):
        done = sglang("generate", "-m", "--prompt", "a", *given, "sampling.guidance_scale=2")
        assert (done.code, len(done.lines)) == (2, 1), done.err
        assert f"output.path is {folder}: the folder of a sweep cannot have ${{ in its name" in done.err
    assert os.listdir() == ["record.json"]


@pytest.mark.whole
def test_what_a_record_repeats_is_the_picture(sglang, pipelines):
    """The rest of a record stands as before."""
    words = [f"sampling.{name}={value}" for name, value in SMALL.items()]
    assert sglang("generate", f"model.path={pipelines['sd15']}", *words, "--output-path", "first").code == 0
    shutil.copy("first/generated_image_0.json", "record.json")
    found = generate(config="record.json")
    assert isinstance(found, Result)
    assert found.paths[0].parent == Path("first")
    assert found.paths[0].read_bytes() != b""
