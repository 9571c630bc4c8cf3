"""The parser is strict, and every failure leaves through one door: a sentence on stderr and an exit code."""

import importlib
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sglang_gen import cli
from sglang_gen.errors import RunError
from sglang_gen.signals import Terminated

OPTIONS = [
    (["--promt", "x"], "Unknown option --promt; did you mean '--prompt'?"),
    (["--prom=x"], "Unknown option --prom; did you mean '--prompt'?"),
    (["--Prompt", "x"], "Unknown option --Prompt; did you mean '--prompt'?"),
    (["--batch-size", "4"], "Unknown option --batch-size; write sampling.batch_size=..."),
    (["--dry-run"], "Unknown option --dry-run; write dry_run=..."),
    (["--device=cpu"], "Unknown option --device; write device=..."),
    (["-x"], "Unknown option -x"),
    (["--"], "Unknown option --"),
    (["--no-prompt"], "Unknown option --no-prompt"),
    (["--prompt"], "--prompt needs a value"),
    (["--prompt", "--seed", "3"], "--prompt needs a value (write --prompt=--seed if '--seed' is the value)"),
    (["--prompt", "-m"], "--prompt needs a value (write --prompt=-m if '-m' is the value)"),
    (["--seed", "1", "--seed=1"], "--seed is given twice"),
    (["--warmup", "--no-warmup"], "--no-warmup is given twice"),
    (["-m", "--multirun"], "--multirun is given twice"),
    (["--warmup=true"], "--warmup is a switch and takes no value (write --warmup or --no-warmup)"),
    (["-m=1"], "-m is a switch and takes no value"),
    (["--cfg", "foo"], "invalid choice: 'foo'"),
    (["--info=foo"], "invalid choice: 'foo'"),
    (["--run", "--multirun"], "--run and --multirun exclude each other"),
    (["--package", "sampling"], "--package has no effect without --cfg"),
    (["--resolve"], "--resolve has no effect without --cfg"),
    (["--cfg", "job", "-m"], "--cfg job shows one job"),
    (["--config-dir="], "--config-dir: '' is not a folder"),
    (["--config-dir", "x" * 5000], "is not a folder"),
    (["--config-name", "nope"], "Cannot find primary config 'nope'"),
]
VALUES = [
    (["--seed", "1.5"], "--seed: '1.5' is not an integer"),
    (["--seed", "9" * 5000], "is not an integer"),
    (["--seed="], "--seed: '' is not an integer"),
    (["--guidance-scale", "high"], "--guidance-scale: 'high' is not a number"),
    (["--guidance-scale", "nan"], "sampling.guidance_scale is nan; it must be a finite number"),
    (["--guidance-scale", "1e400"], "sampling.guidance_scale is inf; it must be a finite number"),
    (["--backend", "DIFFUSERS"], "--backend: 'DIFFUSERS' is not one of auto, sglang, diffusers"),
    (["--dtype", "bf16"], "--dtype: 'bf16' is not one of auto, float32, bfloat16, float16"),
    (["--log-level", "loud"], "--log-level: 'loud' is not one of debug, info, warning, error"),
    (["--diffusers-kwargs", "{"], "--diffusers-kwargs: '{' is not valid JSON"),
    (["--diffusers-kwargs", "[]"], "--diffusers-kwargs: '[]' is not a JSON object"),
    (["--diffusers-kwargs", '{"a": NaN}'], "holds NaN; a number must be finite"),
    (["--diffusers-kwargs", '{"a": 1, "a": 2}'], "gives the key 'a' twice"),
    (["--diffusers-kwargs", "[" * 100_000], "is nested too deeply"),
    (["--diffusers-kwargs", '{"a": 99999999999999999999999}'], "holds an integer of more than 64 bits"),
    (["--component-paths", '{"vae": 1}'], "is not text"),
    (["--lora-target-modules", ","], "is an empty list"),
    (["--cache-dit-config", "none.yaml"], "The file none.yaml does not exist"),
    (["--cache-dit-config", "."], "'.' is not a .json, .yaml or .yml file"),
    (["--prompt=a\udcff"], "is not Unicode text"),
]
OVERRIDES = [
    (["word"], "'word' is neither an option nor an override of the form key=value"),
    ([""], "'' is neither an option nor an override of the form key=value"),
    (["=3"], "Unknown key ''"),
    (["sampling.sed=3"], "Unknown key 'sampling.sed'; did you mean 'sampling.seed'?"),
    (["sampling/seed=3"], "Unknown key 'sampling/seed'; did you mean 'sampling.seed'?"),
    (["num_gpus=4"], "Unknown key 'num_gpus'; write --num-gpus or parallel.num_gpus=..."),
    (["+foo=1"], "Unknown key 'foo'"),
    (["sampling._target_=x"], "Unknown key 'sampling._target_'"),
    (["sampling.seed.x=1"], "Unknown key 'sampling.seed.x'"),
    (["~sampling.seed"], "a key of the schema cannot be deleted"),
    (["sampling.seed=1", "++sampling.seed=2"], "'sampling.seed' is overridden twice"),
    (["--seed", "1", "sampling.seed=1"], "sampling.seed is given twice, by --seed and by the override"),
    (["--diffusers-kwargs", "{}", "backend.diffusers_kwargs.eta=1"], "backend.diffusers_kwargs is given twice"),
    (["sampling.seed=1,2"], "'sampling.seed=1,2' is a sweep: add -m"),
    (["model=glob(*)"], "is a sweep: add -m"),
    (["model=SDLX"], "Unknown option 'SDLX' of the group 'model'; did you mean 'sdxl'?"),
    (["model=[sdxl]"], "The group 'model' takes the name of one option"),
    (["experiment=null"], "Unknown option 'null' of the group 'experiment'; did you mean 'none'?"),
    (["+lora=example"], "'+lora=example': the group has an option already; write lora=example"),
    (["model@x=sd15"], "'model@x=sd15': groups take no package here; write model=sd15"),
    (["--backend", "auto", "backend=diffusers"], "--backend and 'backend=diffusers' both choose backend.name"),
    (["hydra.run.dir=x"], "'hydra.run.dir=x' has no effect in a single run"),
    (["hydra=null"], "'hydra=null' has no effect in a single run"),
    (["hydra/launcher=joblib"], "'hydra/launcher=joblib' has no effect in a single run"),
    (["sampling.seed=[1,2]"], "sampling.seed: '[1, 2]' is not an integer"),
    (["sampling.num_inference_steps=null"], "sampling.num_inference_steps: null is not an integer"),
    (
        ["sampling.negative_prompt=${nowhere}"],
        "the interpolation names the key nowhere, which does not exist",
    ),
    (["sampling.negative_prompt=???"], "sampling.negative_prompt: a value is required (???) and none is given"),
    (["sampling.negative_prompt='it''s'"], "cannot be read"),
    (["lora.adapters=[{pth: a}]"], "pth: there is no such key"),
    (["dtype=fp32"], "dtype: 'fp32' is not one of "),
    (["model.path=", "--prompt", "x"], "model.path is blank"),
    (["output.perf_dump_path=' '"], "output.perf_dump_path is blank"),
    (["model.path=null", "--prompt", "x"], "No model is named"),
    (["--output-path", "a\0b"], "output.path holds a zero byte"),
    (["--output-path", "x" * 300], "output.path is too long to name anything"),
    (["--perf-dump-path", "."], "output.perf_dump_path is the folder .; it must name a JSON file"),
]


@pytest.mark.parametrize(("argv", "sentence"), [*OPTIONS, *VALUES, *OVERRIDES])
def test_a_wrong_request_is_one_sentence_and_exit_code_2(sglang, argv, sentence):
    model = [] if any(word.startswith(("model=", "model@")) for word in argv) else ["model=sdxl"]
    done = sglang("generate", *model, *argv)
    assert done.code == 2, done.err
    errors = [line for line in done.lines if not line.startswith("INFO: ")]
    assert len(errors) == 1
    assert errors[0].startswith("ERROR: ")
    assert sentence in errors[0]
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        ([], 2, "usage: sglang COMMAND"),
        (["--help"], 0, "usage: sglang COMMAND"),
        (["--version"], 0, "sglang-gen "),
        (["generate", "--version"], 0, "sglang-gen "),
        (["generate", "-h", "--nonsense-after-help=1"], 2, "Unknown option --nonsense-after-help"),
        (["models", "--help"], 0, "usage: sglang models"),
        (["models", "x"], 2, "sglang models takes no arguments, found 'x'"),
        (["genrate"], 2, "Unknown command 'genrate'; did you mean 'generate'?"),
        (["serve"], 2, "'sglang serve' is not part of sglang-gen"),
        ([""], 2, "Unknown command ''"),
    ],
)
def test_commands(sglang, argv, code, text):
    done = sglang(*argv)
    assert done.code == code
    assert text in done.out + done.err


def test_a_switch_can_be_turned_off_again(composed):
    assert composed("model=sdxl", "compile=full", "--no-warmup").run.compile.warmup is False


def test_generate_from_python_takes_the_flags_as_keywords():
    generate = importlib.import_module("sglang_gen.generate").generate
    with pytest.raises(ValueError, match="takes no keyword 'promt'; did you mean 'prompt'"):
        generate(promt="x")
    with pytest.raises(ValueError, match=r"--height: '1\.5' is not an integer"):
        generate(prompt="x", height=1.5)
    with pytest.raises(ValueError, match="no keyword 'config_dir'"):
        generate(config_dir="x")
    with pytest.raises(ValueError, match=r"--seed: '3\.5' is not an integer"):
        generate(prompt="x", seed=np.float32(3.5))


def test_generate_from_python_takes_paths_and_the_numbers_of_numpy(monkeypatch):
    module = importlib.import_module("sglang_gen.generate")
    monkeypatch.setattr(module, "execute", lambda composed: composed.run)
    Path("c.json").write_text('{"Fn_compute_blocks": 4}')
    run = module.generate(
        "model=sdxl", prompt="a", output_path=Path("q"), image_path=Path("fox.png"), cache_dit_config=Path("c.json"),
        seed=np.int64(3), num_inference_steps=np.float32(2), guidance_scale=np.float32(0.5), height=np.int32(64),
    )  # fmt: skip
    assert (run.output.path, run.sampling.image_path) == ("q", "fox.png")
    assert run.cache.cache_dit_config == {"Fn_compute_blocks": 4}
    values = [getattr(run.sampling, name) for name in ("seed", "num_inference_steps", "guidance_scale", "height")]
    assert values == [3, 2, 0.5, 64]
    assert [type(value) for value in values] == [int, int, float, int]
    assert module.generate(model_path=Path("~/m"), prompt="a").model.path == str(Path("~/m").expanduser())


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (RunError("the disk is full"), 1, "ERROR: the disk is full"),
        (
            KeyError("lost"),
            1,
            " ended the run (--log-level debug shows it)",
        ),
        (KeyboardInterrupt(), 130, "ERROR: Interrupted"),
        (Terminated(), 143, "ERROR: Terminated"),
        (BrokenPipeError(), 1, ""),
    ],
)
@pytest.mark.parametrize("level", ["info", "debug"])
def test_a_failure_while_running_has_its_exit_code(sglang, monkeypatch, error, code, sentence, level):
    def fail(_composed):
        raise error

    monkeypatch.setattr(importlib.import_module("sglang_gen.generate"), "execute", fail)
    done = sglang("generate", "model=sdxl", "--log-level", level)
    assert done.code == code
    assert done.err.rstrip("\n").endswith(sentence)
    assert ("Traceback" in done.err) == (level == "debug" and sentence != "")


@pytest.mark.parametrize("argv", [["--log-level", "debug"], ["--log-level=debug"], ["log_level=debug"]])
def test_debug_shows_the_traceback_of_a_user_error(sglang, argv):
    done = sglang("generate", "model=sdxl", "--seed", "-1", *argv)
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.lines[-1] == "ERROR: sampling.seed is -1; it must be at least 0"


def test_a_prompt_about_debugging_shows_no_traceback(sglang):
    done = sglang("generate", "model=sdxl", "--prompt", "a --log-level debug", "--seed", "-1")
    assert "Traceback" not in done.err


def test_the_signal_handler_of_the_host_is_restored(sglang):
    before = signal.getsignal(signal.SIGTERM)
    sglang("generate", "--seed", "x")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.whole
def test_a_primary_configuration_builds_on_the_shipped_one(sglang):
    done = sglang("generate", "--config-name", "sampling/draft", "--prompt", "x")
    assert (done.code, done.lines) == (
        2, ["ERROR: The primary configuration does not build on 'config': put '- config' first in its defaults"],
    )  # fmt: skip


def test_cfg_prints_the_composition_after_the_flags(sglang):
    done = sglang(
        "generate", "--cfg", "job", "--seed", "3", "sampling=draft", "--package", "sampling", "--prompt", "a: b"
    )
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "prompt: 'a: b'"
    assert {"num_inference_steps: 8", "seed: 3"} <= set(lines)
    assert sglang("generate", "--cfg", "job", "--seed", "3", "-p", "sampling.seed").out == "3\n"
    wrong = sglang("generate", "--cfg", "job", "-p", "sampling.nope")
    assert (wrong.code, "the configuration has no 'sampling.nope'" in wrong.err) == (2, True)


@pytest.mark.whole
def test_cfg_prints_hydras_part_too(sglang):
    assert sglang("generate", "-c", "hydra", "-p", "hydra.mode").out == "RUN\n"
    resolved = sglang("generate", "-c=all", "--resolve", "-p", "hydra.sweep.subdir")
    assert (resolved.code, resolved.out) == (0, "'0'\n")
    assert sglang("generate", "--cfg", "all").out.startswith("model:")


@pytest.mark.parametrize("topic", cli.TOPICS)
def test_info_prints_each_topic(sglang, topic):
    before = logging.getLogger().handlers[:]
    done = sglang("generate", "--info", topic)
    assert done.code == 0, done.err
    assert logging.getLogger().handlers == before
    assert len(done.out) > 50


def test_hydra_help_lists_hydras_groups(sglang):
    done = sglang("generate", "--hydra-help")
    assert done.code == 0
    assert "hydra/launcher: basic" in done.out


@pytest.mark.whole
def test_a_reader_that_leaves_early_costs_no_traceback():
    code = "from sglang_gen.cli import console; console()"
    program = [sys.executable, "-c", code, "generate", "--help"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 1


@pytest.mark.whole
def test_a_dry_run_prints_json_alone_on_standard_output(sglang):
    done = sglang("generate", "model=sdxl", "dry_run=json", "parallel=single")
    assert done.code == 0, done.err
    assert json.loads(done.out)["run"]["model"]["preset"] == "sdxl"
    assert "using the example prompt" in done.err
    assert not Path("outputs").exists()
