"""Ctrl-C and SIGTERM in the middle of denoising: one sentence, the right exit code, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`; threads are not among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended while we looked
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


# A shell starts background jobs with SIGINT ignored, which children inherit; the terminal's child does not.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from sglang_gen.cli import console
console()
"""


def interrupt(number: int, words: list[str]) -> tuple[int, str, list[str]]:
    """Run a generation and send it a signal after its first picture: exit code, stdout, what stderr then says.

    A session of its own stands for the terminal, and no process of it is left.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "generate", *words],
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    while not (lines and lines[-1].startswith("INFO: Generated image saved to: ")):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    time.sleep(0.05)
    family = [process.pid, *children(process.pid)]
    os.killpg(process.pid, number)  # as a terminal or a container does: to everybody
    out, rest = process.communicate(timeout=120)
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    return process.returncode, out, [line for line in rest.splitlines() if not line.startswith("INFO: ")]


def check_pictures(folder: Path, *others: str) -> None:
    """There is at least one picture, every picture is whole and has its record, and nothing else is there."""
    names = {path.name for path in folder.iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    assert pictures
    assert names == pictures | {name.replace(".png", ".json") for name in pictures} | set(others)
    assert all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in folder.glob("*.png"))


ENDINGS = [(signal.SIGINT, 130, "ERROR: Interrupted"), (signal.SIGTERM, 143, "ERROR: Terminated")]
MANY = ["--prompt", "a", "--height", "32", "--width", "32", "--num-samples", "99999", "--num-inference-steps", "50"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize(("number", "code", "sentence"), ENDINGS)
def test_a_signal_while_denoising_ends_the_run_cleanly(pipelines, tmp_path, number, code, sentence):
    words = ["--model-path", str(pipelines["sd15"]), *MANY, "--output-path", str(tmp_path)]
    assert interrupt(number, words) == (code, "", [sentence])
    check_pictures(tmp_path)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize(("number", "code", "sentence"), ENDINGS)
def test_a_signal_ends_a_whole_sweep_and_the_job_says_so(pipelines, tmp_path, number, code, sentence):
    words = ["--model-path", str(pipelines["sd15"]), *MANY, "--output-path", str(tmp_path), "-m",
             "sampling.guidance_scale=2,3"]  # fmt: skip
    assert interrupt(number, words) == (code, "", [sentence])
    assert {path.name for path in tmp_path.iterdir()} == {"multirun.yaml", "0"}
    check_pictures(tmp_path / "0", "job.json")
    note = json.loads((tmp_path / "0" / "job.json").read_text())
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (note["status"], note["error"]) == (word, f"The sweep was {word} in this job")
