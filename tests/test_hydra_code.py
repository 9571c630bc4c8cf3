"""What a configuration folder may make Hydra instantiate: classes of installed plugins and ours, whoever wrote it."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from sglang_gen.config import hydra_code, hydra_loader
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.errors import UserError

EVIL = "stranger.Callback"
ALLOWED = "only classes of installed Hydra plugins and of sglang_gen are taken"
LOGS = "and no other class"
OTHER = "and no other interpolation"
MAPPING = "which may be a mapping: write the value in place of the interpolation"


@pytest.fixture(autouse=True)
def trace(monkeypatch) -> Path:
    """The file that a stranger's module leaves behind when it is imported or called."""
    Path("modules").mkdir()
    for name in ("stranger", "stranger_conf/__init__"):
        path = Path("modules", f"{name}.py")
        path.parent.mkdir(exist_ok=True)
        touch = f"Path({str(Path('trace').absolute())!r}).touch()"
        path.write_text(f"from pathlib import Path\n{touch}\ndef Callback(*_, **__):\n    {touch}\n")
        monkeypatch.delitem(sys.modules, name.partition("/")[0], raising=False)
    monkeypatch.syspath_prepend(str(Path("modules").absolute()))
    return Path("trace")


def sweep(hydra: object, **more: object) -> tuple[str, ...]:
    """A sweep file that sets Hydra's own keys."""
    Path("conf").mkdir(exist_ok=True)
    content = {"defaults": ["config", "_self_"], "hydra": hydra, "sampling": {"prompt": "a"}, **more}
    Path("conf/mine.yaml").write_text(yaml.safe_dump(content))
    return ("--config-dir", "conf", "--config-name", "mine", "--output-path", "sweep")


def handler(kind: str, **settings: object) -> dict:
    return {"version": 1, "root": {"handlers": ["x"]}, "handlers": {"x": {"class": kind, **settings}}}


TARGET = {"_target_": EVIL}
KWARGS = "${backend.diffusers_kwargs}"
CREATE = "${oc.create:{_target_:stranger.Callback}}"
GET = {"_target_": "hydra.utils.get_class", "path": EVIL}
STREAM = "logging.StreamHandler"
NODES: dict[str, tuple[dict, str, str]] = {
    "a callback": ({"callbacks": {"x": TARGET}}, "hydra.callbacks.x._target_ is stranger.Callback", ALLOWED),
    "below one of ours": ({"callbacks": {"table": {"x": [1, TARGET]}}}, "callbacks.table.x[1]._target_ is", ALLOWED),
    "a launcher": ({"launcher": TARGET}, "hydra.launcher._target_ is stranger.Callback", ALLOWED),
    "a sweeper": ({"sweeper": TARGET}, "hydra.sweeper._target_ is stranger.Callback", ALLOWED),
    "parameters": ({"sweeper": {"params": {"x": TARGET}}}, "hydra.sweeper.params.x._target_ is", ALLOWED),
    "a way around": ({"callbacks": {"x": GET}}, "_target_ is hydra.utils.get_class", ALLOWED),
    "through ours": ({"callbacks": {"x": {"_target_": "sglang_gen.cli.os.system"}}}, "cli.os.system", ALLOWED),
    "through Hydra": ({"callbacks": {"x": {"_target_": "hydra.utils.os.system"}}}, "utils.os.system", ALLOWED),
    "an interpolated name": ({"callbacks": {"x": {"_target_": "${oc.env:EVIL}"}}}, "is ${oc.env:EVIL}", ALLOWED),
    "a node elsewhere": ({"callbacks": {"x": KWARGS[:-1] + ".x}"}}, "callbacks.x is ${backend", MAPPING),
    "all of them": ({"callbacks": KWARGS}, "hydra.callbacks is ${backend", MAPPING),
    "a way through": ({"callbacks": {"x": "${hydra.callbacks.y.z}", "y": KWARGS}}, "hydra.callbacks.x is", MAPPING),
    "a made node": ({"callbacks": {"x": CREATE}}, "callbacks.x is ${oc.create", MAPPING),
    "a decoded node": ({"callbacks": {"x": "${oc.decode:${oc.env:NODE}}"}}, "callbacks.x is ${oc.decode", MAPPING),
    "a circle": ({"callbacks": {"x": "${hydra.callbacks.x}"}}, "callbacks.x is ${hydra.callbacks.x}", MAPPING),
    "a handler": ({"job_logging": handler(EVIL)}, "job_logging.handlers.x.class is stranger.Callback", LOGS),
    "a class of the library": ({"job_logging": handler("subprocess.Popen", args=["true"])}, "subprocess.Popen", LOGS),
    "a factory": ({"hydra_logging": handler(STREAM, stream={"()": EVIL})}, "handlers.x.stream.() is", LOGS),
    "an object": ({"job_logging": handler(STREAM, stream=f"ext://{EVIL}")}, "is ext://stranger", "no other object"),
    "handlers elsewhere": ({"job_logging": {"version": 1, "root": {}, "handlers": KWARGS}}, "handlers is", OTHER),
    "an object of a variable": ({"job_logging": handler(STREAM, stream="${oc.env:OBJECT}")}, "stream is ${oc", OTHER),
    "an object in two halves": ({"job_logging": handler(STREAM, stream="e${oc.env:HALF}")}, "stream is e${oc", OTHER),
    "a folder that is none": (
        {
            "hydra_logging": handler(STREAM, stream="${hydra.runtime.output_dir}//stranger.Callback"),
            "runtime": {"output_dir": "ext:"},
        },
        "stream is ${hydra.runtime.output_dir}//stranger",
        OTHER,
    ),
    "a list of names": (
        {"callbacks": {"x": {"_target_": [EVIL]}}},
        "hydra.callbacks.x._target_ is ['stranger",
        ALLOWED,
    ),
    "our own main": ({"searchpath": ["pkg://sglang_gen.__main__"]}, "would import sglang_gen.__main__", "file://"),
    "a folder outside": (
        {"output_subdir": "../../out"},
        "hydra.output_subdir is ../../out; it must be",
        "in the job's own",
    ),
    "a way out": ({"searchpath": ["pkg://hydra/../stranger_conf"]}, "would import hydra/../stranger_conf", "file://"),
    "a package": ({"searchpath": ["pkg://stranger_conf"]}, "pkg://stranger_conf would import stranger_conf", "file://"),
    "an interpolated package": ({"searchpath": ["pkg://${oc.env:PACKAGE}"]}, "would import stranger_conf", "file://"),
}

MODES = {"single": (), "sweep": ("-m",), "shown": ("--cfg", "hydra")}


@pytest.mark.parametrize(("name", "mode"), [*((name, "sweep") for name in NODES), *(("a callback", m) for m in MODES)])
def test_other_peoples_code_is_refused_before_it_is_imported(sglang, monkeypatch, trace, name, mode):
    monkeypatch.setenv("EVIL", EVIL)
    monkeypatch.setenv("PACKAGE", "stranger_conf")
    monkeypatch.setenv("OBJECT", f"ext://{EVIL}")
    monkeypatch.setenv("HALF", f"xt://{EVIL}")
    monkeypatch.setenv("NODE", json.dumps(TARGET))
    hydra, *sentences = NODES[name]
    words = sweep(hydra, backend={"diffusers_kwargs": {"x": TARGET, "z": TARGET}})
    done = sglang("generate", *words, *MODES[mode])
    assert (done.code, len(done.lines)) == (2, 1), done.err
    for sentence in sentences:
        assert sentence in done.err
    assert not trace.exists()
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    "word",
    [
        f"hydra.launcher._target_={EVIL}",
        f"hydra.sweeper._target_={EVIL}",
        f"+hydra.callbacks.x={{_target_:{EVIL}}}",
        f"+hydra.callbacks.x._target_={EVIL}",
        "hydra.searchpath=[pkg://stranger_conf]",
        "hydra.searchpath=['pkg://stranger_conf/below']",
    ],
)
def test_the_command_line_names_no_code_of_others_either(sglang, trace, word):
    done = sglang("generate", "-m", "--prompt", "a", "--output-path", "sweep", word, "sampling.seed=1,2")
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert ALLOWED in done.err or "would import stranger_conf" in done.err
    assert not trace.exists()


@pytest.mark.parametrize("place", ["model", "sampling", "experiment"])
@pytest.mark.parametrize("swept", [False, True])
def test_an_option_of_a_group_names_no_code_even_when_a_job_chooses_it(sglang, trace, place, swept):
    content = {"hydra": {"job_logging": {"version": 1, "root": {"handlers": ["x"]}, "handlers": {"x": {"()": EVIL}}}}}
    Path("conf", place).mkdir(parents=True)
    Path("conf", place, "own.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(content)}")
    other = {"model": "landscape", "sampling": "default", "experiment": "none"}[place]
    choice = f"{place}=own,{other}" if swept else f"{place}=own"
    done = sglang("generate", "-m", "--config-dir", "conf", "--prompt", "a", "--output-path", "sweep", choice)
    assert done.code == 2, done.err
    assert "hydra.job_logging.handlers.x.() is stranger.Callback" in done.lines[-1]
    assert not trace.exists()


def test_a_configuration_file_has_no_keys_of_hydra(trace):
    for content in ({"hydra": {"callbacks": {"x": TARGET}}}, {"hydra.callbacks.x._target_": EVIL}):
        Path("file.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="unknown key 'hydra"):
            compose(Choices(file="file.json"))
    Path("file.json").write_text(json.dumps({"prompt": "a", "diffusers_kwargs": TARGET}))
    assert compose(Choices(file="file.json")).run.backend.diffusers_kwargs == TARGET  # data, which nothing instantiates
    assert not trace.exists()


@pytest.mark.whole
@pytest.mark.parametrize(
    "hydra",
    [
        {"callbacks": {"log": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}}},
        {"callbacks": {"again": {"_target_": "sglang_gen.sweep.callback.SweepTable"}}},
        {"launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}},
        {"output_subdir": ".hydra"},
        {"sweeper": {"params": {"sampling.seed": "${oc.env:SEEDS}"}}},
        {"searchpath": ["pkg://hydra.conf", "file://more", "more"]},
        {"job_logging": {"version": 1, "root": {"handlers": ["x"], "level": "INFO"}, "handlers": {
            "x": {"class": "logging.FileHandler", "filename": "${hydra.runtime.output_dir}/${hydra.job.name}"}}}},
        {"job_logging": {"version": 1, "root": {"handlers": ["x"]}, "handlers": {
            "x": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "level": "ERROR"}}}},
    ],
)  # fmt: skip
def test_what_is_installed_goes_on_working(composed, monkeypatch, hydra):
    monkeypatch.setenv("SEEDS", "1,2")
    Path("more").mkdir()
    jobs = composed(*sweep(hydra), "-m", "model=sdxl")
    assert len(jobs) == (2 if "sweeper" in hydra else 1)


def test_what_a_plugin_registers_may_be_instantiated(monkeypatch):
    """As the sweeper of Optuna names samplers of optuna in the configuration that it stores."""
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", dict(store.repo))
    monkeypatch.setitem(
        store.repo, "hydra", {k: dict(v) if isinstance(v, dict) else v for k, v in store.repo["hydra"].items()}
    )
    store.store(group="hydra/sweeper", name="tpe", node={"sampler": {"_target_": "optuna.samplers.SamplerOfAPlugin"}})
    installed = hydra_loader.instantiable.__wrapped__()
    assert "optuna.samplers.SamplerOfAPlugin" in installed
    hydra_code.check_targets(
        {"hydra": {"sweeper": {"sampler": {"_target_": "optuna.samplers.SamplerOfAPlugin"}}}}, installed
    )
    assert "optuna.samplers.SamplerOfAPlugin" not in hydra_loader.instantiable()
