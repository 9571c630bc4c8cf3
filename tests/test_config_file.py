"""--config FILE: three forms, strict keys and types, and never a traceback whatever the file holds."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_gen.config.config_file import FileValues, read_config_file, read_mapping
from sglang_gen.config.flags import BY_KEY
from sglang_gen.config.schema import SCHEMA_VERSION, BackendName, DType, leaves
from sglang_gen.errors import UserError

RECORD = {
    "schema_version": SCHEMA_VERSION,
    "run": {
        "model": {"path": "x/y", "preset": None},
        "sampling": {"prompt": "p", "seed": None},
        "parallel": {"num_gpus": 2, "dp_degree": 1},
        "dtype": "auto",
    },
    "sources": {"parallel.num_gpus": "flag", "parallel.dp_degree": "default"},
    "effective": {"backend": "diffusers", "dtype": "float32", "device": "cpu", "seed": 7, "attention": "sdpa"},
    "versions": {"torch": "1.0"},
}


def write(content: object, name: str = "file.json") -> str:
    Path(name).write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
    return name


@pytest.mark.parametrize("name", ["file.json", "file.yaml", "FILE.YML"])
@pytest.mark.parametrize(
    "content",
    [
        {"model_path": "x/y", "num_inference_steps": 3, "backend": "diffusers", "diffusers_kwargs": {"eta": 0.5}},
        {"model": {"path": "x/y"}, "sampling": {"num_inference_steps": 3}, "backend": {"name": "diffusers",
         "diffusers_kwargs": {"eta": 0.5}}},
        {"model.path": "x/y", "sampling.num_inference_steps": 3, "backend.name": "diffusers",
         "backend.diffusers_kwargs": {"eta": 0.5}},
    ],
)  # fmt: skip
def test_flag_names_group_keys_and_paths_mean_the_same(name, content):
    assert read_config_file(write(content, name)).values == {
        "model.path": "x/y",
        "sampling.num_inference_steps": 3,
        "backend.name": BackendName.diffusers,
        "backend.diffusers_kwargs": {"eta": 0.5},
    }


def test_a_record_pins_what_the_run_decided():
    found = read_config_file(write(RECORD))
    assert found.values == {
        "model.path": "x/y",
        "model.preset": None,
        "sampling.prompt": "p",
        "sampling.seed": 7,
        "parallel.num_gpus": 2,  # dp_degree was nobody's: it follows from the others again
        "dtype": DType.float32,
        "backend.name": BackendName.diffusers,
        "device": found.values["device"],
        "attention.backend": "sdpa",
    }
    assert found.values["device"].name == "cpu"
    assert found.versions == {"torch": "1.0"}


@pytest.mark.parametrize(("source", "folder"), [("default", None), ("flag", "mine"), ("file", "mine")])
def test_a_record_names_the_folder_that_was_stated_and_no_perf_dump(source, folder):
    where = {"path": "mine", "perf_dump_path": "mine/p.json", "latents": True}
    sources = {"output.path": source, "output.perf_dump_path": "flag"}
    found = read_config_file(write({**RECORD, "run": {"output": where}, "sources": sources})).values
    assert (found.get("output.path"), found["output.latents"]) == (folder, True)
    assert "output.perf_dump_path" not in found


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, f"schema version {SCHEMA_VERSION + 1}; this sglang-gen reads up to"),
        ({"schema_version": 0}, "schema version 0"),
        ({"schema_version": "1"}, "schema version 1"),
        ({"schema_version": True}, "schema version True"),
        ({"run": None}, "has a schema_version but no 'run'"),
        ({"run": []}, "has a schema_version but no 'run'"),
        ({"run": [1]}, "'run' of the record is not a mapping"),
        ({"effective": [1]}, "'effective' of the record is not a mapping"),
        ({"versions": "new"}, "'versions' of the record is not a mapping"),
        ({"effective": {"dtype": "float8"}}, "effective.dtype: 'float8' is not one of"),
        ({"run": {"sampling": {"sed": 1}}}, "unknown key 'sampling.sed'; did you mean 'sampling.seed'?"),
    ],
)
def test_a_record_that_cannot_be_read(change, sentence):
    with pytest.raises(UserError) as error:
        read_config_file(write({**RECORD, **change}))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"model-path": "x"}, "unknown key 'model-path'; did you mean 'model_path'?"),
        ({"sampling": {"sed": 1}}, "unknown key 'sampling.sed'; did you mean 'sampling.seed'?"),
        ({1: "x"}, "unknown key '1'"),
        ({"config": "other.json"}, "cannot name another with 'config'"),
        ({"seed": 1, "sampling": {"seed": 2}}, "gives sampling.seed twice"),
        ({"seed": "many"}, "seed: 'many' is not an integer"),
        ({"seed": 1.5}, "seed: '1.5' is not an integer"),
        ({"seed": True}, "seed: 'True' is not an integer"),
        ({"num_gpus": None}, "num_gpus: null is not an integer"),
        ({"prompt": 5}, "prompt: '5' is not text (quotes make it text)"),
        ({"prompt": ["a"]}, "is not text"),
        ({"warmup": "yes"}, "warmup: 'yes' is not true or false"),
        ({"dtype": "bf16"}, "dtype: 'bf16' is not one of"),
        ({"component_paths": {"vae": 1}}, "is not text"),
        ({"diffusers_kwargs": [1]}, "is not a JSON object"),
        ({"lora_target_modules": {"a": 1}}, "is not a list"),
        ({"lora": {"adapters": [{"pth": "a"}]}}, "has the unknown key 'pth'; the keys are path, nickname"),
        ({"lora": {"adapters": [1]}}, "is not a mapping with the keys path"),
        ({"sampling": None}, "'sampling' takes the name of an option or a mapping of keys, not None"),
        ({"model": 3}, "'model' takes the name of an option or a mapping of keys, not 3"),
        ({"cache_dit_config": "nowhere.yaml"}, "The file nowhere.yaml does not exist"),
        ({}, None),
    ],
)
def test_keys_and_types_are_checked(content, sentence):
    if sentence is None:
        assert read_config_file(write(content)) == FileValues()
        return
    with pytest.raises(UserError) as error:
        read_config_file(write(content, "file.yaml"))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"{}", "'a.txt' is not a .json, .yaml or .yml file"),
        ("a.yaml", b"", "holds no mapping"),
        ("a.yaml", b"- 1", "holds no mapping"),
        ("a.json", b"", "is not valid JSON: Expecting value at character 1"),
        (
            "a.json",
            b'{\n"seed": 1,\n}',
            "Expecting property name enclosed in double quotes in line 3",
        ),
        ("a.json", b'{"seed": 1, "seed": 2}', "gives the key 'seed' twice"),
        ("a.yaml", b"seed: 1\nseed: 2", "the key 'seed' twice in line 1"),
        ("a.yaml", b"\xff\xfe", "is not UTF-8 text"),
        ("a.yaml", b"prompt: 'x", "is not valid YAML"),
        ("a.yaml", b'prompt: "a\0b"', "is not valid YAML: special characters are not allowed"),
        ("a.yaml", b"prompt: a\n---\nprompt: b", "is not valid YAML: but found another document"),
        ("a.yaml", b"prompt: !!python/object:os.system x", "could not determine a constructor"),
        ("a.yaml", b"warmup: !!bool maybe", "a value does not fit its tag"),
        ("a.yaml", b"seed: !!int ''", "a value does not fit its tag"),
        ("a.yaml", b"prompt: !!timestamp x", "a value does not fit its tag"),
        ("a.yaml", b"prompt: !!binary aGk=", "prompt is of the type bytes, which JSON does not have"),
        ("a.yaml", b"lora_target_modules: !!set {a}", "is of the type set"),
        ("a.yaml", b"guidance_scale: .nan", "guidance_scale is nan; it must be a finite number"),
        ("a.json", b'{"guidance_scale": Infinity}', "holds Infinity; a number must be finite"),
        ("a.json", b'{"guidance_scale": 1e400}', "guidance_scale is inf"),
        ("a.json", b'{"seed": ' + b"9" * 5000 + b"}", "holds an integer of more than 64 bits"),
        ("a.yaml", b"seed: " + b"9" * 5000, "a number is too long"),
        ("a.yaml", b"seed: 0x" + b"f" * 5000, "seed is an integer of more than 64 bits"),
        ("a.json", b'{"prompt": "\\ud800"}', "prompt holds characters that are not Unicode text"),
        ("a.json", b'{"\\ud800": 1}', "holds characters that are not Unicode text"),
        ("a.json", b'{"prompt":' + b"[" * 100_000, "is nested too deeply"),
        ("a.yaml", b"prompt: " + b"[" * 2000, "is nested too deeply"),
        ("a.yaml", b"diffusers_kwargs: &a {x: *a}", "has an alias inside of the value that it stands for"),
    ],
)
def test_odd_files_are_one_sentence(name, content, sentence):
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_config_file(name)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [".", "/dev/null", "", "missing.json", "a\0.json", "x" * 5000 + ".json", "d.yaml"])
def test_what_is_no_file_is_one_sentence(name):
    Path("d.yaml").mkdir()
    with pytest.raises(UserError) as error:
        read_mapping(name)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_anchors_merges_and_dates_are_read():
    Path("a.json").write_text('{"seed": 1}', "utf-8-sig")
    assert read_config_file("a.json").values == {"sampling.seed": 1}
    Path("a.yaml").write_text("prompt: &x 2020-01-01\nnegative_prompt: *x\n", "utf-8-sig")
    assert read_config_file("a.yaml").values == {
        "sampling.prompt": "2020-01-01", "sampling.negative_prompt": "2020-01-01",
    }  # fmt: skip
    Path("a.yaml").write_text("sampling: {<<: {seed: 1, height: 8}, seed: 2}")
    assert read_config_file("a.yaml").values == {"sampling.seed": 2, "sampling.height": 8}


def test_a_setting_in_json_may_name_a_file():
    write({"Fn_compute_blocks": 4}, "cache.yaml")
    found = read_config_file(write({"cache_dit_config": "cache.yaml", "nunchaku_config": '{"rank": 32}'}))
    assert found.values == {"cache.cache_dit_config": {"Fn_compute_blocks": 4}, "quant.nunchaku_config": {"rank": 32}}


def test_a_wrong_file_is_exit_code_2(sglang):
    done = sglang("generate", "--config", "missing.json")
    assert (done.code, done.lines) == (2, ["ERROR: The file missing.json does not exist"])
    assert sglang("generate", "--config", "").lines == ["ERROR: '' is not a .json, .yaml or .yml file"]
    write({"seed": -1, "prompt": "x", "model": "sdxl"})
    assert sglang("generate", "--config", "file.json").lines == ["ERROR: sampling.seed is -1; it must be at least 0"]


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
KEY = st.sampled_from([*BY_KEY, *leaves(), "model", "sampling", "lora", "schema_version", "run", "effective"])
GROUPED = st.dictionaries(st.sampled_from([path.rpartition(".")[2] for path in leaves()]), VALUE, max_size=3)
quick = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def read_or_refuse(name: str) -> None:
    with suppress(UserError):
        assert set(read_config_file(name).values) <= set(leaves())


@pytest.mark.whole
@quick
@given(
    content=st.dictionaries(KEY | st.text(max_size=5), VALUE | GROUPED, max_size=4),
    name=st.sampled_from(["f.json", "f.yaml"]),
)
def test_any_mapping_is_read_or_refused(content, name):
    read_or_refuse(write(content, name))


@quick
@given(content=st.binary(max_size=60) | st.text("abc:{}[]&*!<>|-?\"'\n 0.#%", max_size=40).map(str.encode))
@pytest.mark.parametrize("name", ["f.json", "f.yaml"])
def test_any_bytes_are_read_or_refused(content, name):
    Path(name).write_bytes(content)
    read_or_refuse(name)
