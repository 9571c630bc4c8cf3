"""Ctrl-C and SIGTERM in the middle of denoising: one sentence, the right exit code, and nothing left behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from started import ROOT, children, ending, generating, gone, said, started

from sglang_gen import files, log
from sglang_gen.errors import RunError, UserError
from sglang_gen.parallel import mesh


def interrupt(number: int, words: list[str]) -> tuple[int, str, list[str]]:
    """Run a generation and send it a signal after its first picture: exit code, stdout, what stderr then says.

    No process of it is left.
    """
    process = generating(words)
    time.sleep(0.05)
    family = [process.pid, *children(process.pid)]
    os.killpg(process.pid, number)  # as a terminal or a container does: to everybody
    out, rest = ending(process)
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    return process.returncode, out, said(rest)


def check_pictures(folder: Path, *others: str) -> None:
    """There is at least one picture, every picture is whole and has its record, and nothing else is there."""
    names = {path.name for path in folder.iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    assert pictures
    assert names == pictures | {name.replace(".png", ".json") for name in pictures} | set(others)
    assert all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in folder.glob("*.png"))


ENDINGS = [
    (signal.SIGINT, 130, "ERROR: Interrupted"),
    pytest.param(signal.SIGTERM, 143, "ERROR: Terminated", marks=pytest.mark.slow),
]
MANY = ["--prompt", "a", "--height", "32", "--width", "32", "--num-samples", "99999", "--num-inference-steps", "50"]


@pytest.mark.whole
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize(("number", "code", "sentence"), ENDINGS)
def test_a_signal_while_denoising_ends_the_run_cleanly(pipelines, tmp_path, number, code, sentence):
    words = ["--model-path", str(pipelines["sd15"]), *MANY, "--output-path", str(tmp_path)]
    assert interrupt(number, words) == (code, "", [sentence])
    check_pictures(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize(("number", "code", "sentence"), ENDINGS)
def test_a_signal_ends_a_whole_sweep_and_the_job_says_so(pipelines, tmp_path, number, code, sentence):
    words = ["--model-path", str(pipelines["sd15"]), *MANY, "--output-path", str(tmp_path), "-m",
             "sampling.guidance_scale=2,3"]  # fmt: skip
    again = f"{sentence}; continue with: sglang generate {shlex.join(words)}"
    assert interrupt(number, words) == (code, "", [again])
    made = {path.name for path in tmp_path.iterdir()} - {".sweep.lock"}
    assert made == {"multirun.yaml", "sweep.json", "0", "table.csv", "table.md", "report.html", "grid.png"}
    check_pictures(tmp_path / "0", "job.json")
    note = json.loads((tmp_path / "0" / "job.json").read_text())
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (note["status"], note["error"]) == (word, f"The sweep was {word} in this job")
    assert "generated_image_0.png" in note["files"]
    assert f"\n- 0: The sweep was {word} in this job\n" in (tmp_path / "table.md").read_text()


# The command's script, which receives a signal when the module of the first argument is looked for.
AT_IMPORT = """
import os, signal, sys
_, module, number, *words = sys.argv
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["/bin/sglang", *words]
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Interrupting())
from sglang_gen.cli import console
console()
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    ("module", "number", "code", "sentence"),
    [
        ("sglang_gen.env", signal.SIGINT, -signal.SIGINT, ""),  # what it dies of says enough
        ("sglang_gen.env", signal.SIGTERM, -signal.SIGTERM, ""),
        ("sglang_gen.config.compose", signal.SIGINT, 130, "ERROR: Interrupted"),
        ("torch", signal.SIGINT, 130, "ERROR: Interrupted"),
        ("torch", signal.SIGTERM, 143, "ERROR: Terminated"),
        ("torch.jit", signal.SIGINT, 130, "ERROR: Interrupted"),  # torch imports it from compiled code
        ("transformers.models.clip.modeling_clip", signal.SIGINT, 130, "ERROR: Interrupted"),
        ("sglang_gen.outputs.input_digests", signal.SIGTERM, 143, "ERROR: Terminated"),
    ],
)
def test_a_signal_during_an_import_ends_the_command_in_one_line(pipelines, module, number, code, sentence):
    words = ["generate", "--model-path", pipelines["sd15"], "--prompt", "a", "--height", 32, "--width", 32]
    done = subprocess.run([sys.executable, "-c", AT_IMPORT, *map(str, (module, int(number), *words))],
                          env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, "\n".join(said(done.stderr))) == (code, sentence)
    assert not list(Path().glob("outputs/*"))


GETSIGNAL = signal.getsignal


def signals_of_a_terminal(number: int) -> object:
    """The handlers of a process of a terminal; a background job of a shell ignores SIGINT, and so does its suite."""
    return signal.default_int_handler if GETSIGNAL(number) is signal.SIG_IGN else GETSIGNAL(number)


def lose(error: type[Exception] | None) -> None:
    """What compiled code does with an exception that a handler raised in it."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        if error:
            raise error("could not determine the shape") from None


@pytest.mark.parametrize("error", [None, RuntimeError])
@pytest.mark.parametrize("words", [[], ["-m", "sampling.seed=1,2"]])
def test_a_signal_that_a_library_has_swallowed_still_ends_the_command(sglang, pipelines, monkeypatch, error, words):
    def prepared(folder: Path) -> None:
        lose(error)
        raise RunError("the run went on") if error else UserError("the run went on")

    monkeypatch.setattr(files, "prepare_folder", prepared)
    monkeypatch.setattr(signal, "getsignal", signals_of_a_terminal)
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a", *words)
    assert (done.code, [line for line in done.lines if line.startswith("ERROR")]) == (130, ["ERROR: Interrupted"])


class Deaf:
    """Python discards what is raised while an object is deleted."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_signal_that_python_has_discarded_is_heard_a_moment_later(sglang, pipelines, monkeypatch):
    def prepared(folder: Path) -> None:
        Deaf()
        time.sleep(5)
        raise AssertionError("the run went on")

    monkeypatch.setattr(files, "prepare_folder", prepared)
    monkeypatch.setattr(signal, "getsignal", signals_of_a_terminal)
    done = sglang("generate", "--model-path", pipelines["sd15"], "--prompt", "a")
    assert (done.code, [line for line in done.lines if not line.startswith("INFO")]) == (130, ["ERROR: Interrupted"])


@pytest.mark.whole
def test_a_signal_that_was_swallowed_before_the_launcher_waits_for_its_ranks_ends_the_run(
    sglang, pipelines, monkeypatch
):
    store = mesh.local_store

    def swallowing():
        lose(None)
        return store()

    monkeypatch.setattr(mesh, "local_store", swallowing)
    monkeypatch.setattr(signal, "getsignal", signals_of_a_terminal)
    done = sglang("generate", "--model-path", pipelines["sd15"], *MANY, "parallel=tp2")
    assert (done.code, [line for line in done.lines if not line.startswith("INFO")]) == (130, ["ERROR: Interrupted"])


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_signal_that_was_swallowed_in_a_step_ends_the_run_in_this_step(sglang, pipelines, monkeypatch, backend):
    step, steps = log.Progress.step, []

    def swallowing(progress):
        steps.append(step(progress))
        lose(None)

    monkeypatch.setattr(log.Progress, "step", swallowing)
    monkeypatch.setattr(signal, "getsignal", signals_of_a_terminal)
    done = sglang("generate", "--model-path", pipelines["sd15"], *MANY, f"backend={backend}")
    assert (done.code, [line for line in done.lines if line.startswith("ERROR")]) == (130, ["ERROR: Interrupted"])
    assert len(steps) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize("layout", ["parallel=single", "parallel=tp2"])
def test_a_signal_at_any_moment_ends_the_command_in_one_line(pipelines, layout):
    words = ["--model-path", str(pipelines["sd15"]), *MANY, layout]
    for number, code, sentence in (
        (signal.SIGINT, 130, "ERROR: Interrupted"),
        (signal.SIGTERM, 143, "ERROR: Terminated"),
    ):
        for seconds in (0.2, 0.8, 1.4, 2.0, 4.0):
            process = started(words)
            assert process.stderr.readline() == "ready\n"
            time.sleep(seconds)
            family = [process.pid, *children(process.pid)]
            os.killpg(process.pid, number)
            _, rest = ending(process)
            assert (process.returncode, said(rest)) in [(code, [sentence]), (-number, [])], seconds
            assert gone(family, within=1)
    assert not list(Path().glob("outputs/.tmp*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
def test_an_interrupt_while_ranks_start_prints_nothing_of_theirs(tmp_path):
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # see `started`
        "from sglang_gen.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "SGLANG_GEN_CACHE": str(tmp_path)}
    for wait in (0.0, 0.05):
        done = subprocess.Popen(
            [sys.executable, "-c", code, "perf", "rates", "--ranks", "2", "--dtype", "float32"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True, process_group=0,
        )  # fmt: skip
        while len(children(done.pid)) < 2 and done.poll() is None:
            time.sleep(0.002)
        time.sleep(wait)
        os.killpg(done.pid, signal.SIGINT)  # as a terminal does
        _, text = ending(done)
        assert "SpawnProcess" not in text
        assert done.returncode == 130
        assert "Traceback" not in text
