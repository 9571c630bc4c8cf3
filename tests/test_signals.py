"""Ctrl-C and SIGTERM in the middle of denoising: one sentence, the right exit code, and nothing left behind."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from started import children, generating, said


def interrupt(number: int, words: list[str]) -> tuple[int, str, list[str]]:
    """Run a generation and send it a signal after its first picture: exit code, stdout, what stderr then says.

    No process of it is left.
    """
    process = generating(words)
    time.sleep(0.05)
    family = [process.pid, *children(process.pid)]
    os.killpg(process.pid, number)  # as a terminal or a container does: to everybody
    out, rest = process.communicate(timeout=120)
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


@pytest.mark.whole
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize(("number", "code", "sentence"), ENDINGS)
def test_a_signal_ends_a_whole_sweep_and_the_job_says_so(pipelines, tmp_path, number, code, sentence):
    words = ["--model-path", str(pipelines["sd15"]), *MANY, "--output-path", str(tmp_path), "-m",
             "sampling.guidance_scale=2,3"]  # fmt: skip
    assert interrupt(number, words) == (code, "", [sentence])
    assert {path.name for path in tmp_path.iterdir()} == {"multirun.yaml", "0", "table.csv", "table.md"}
    check_pictures(tmp_path / "0", "job.json")
    note = json.loads((tmp_path / "0" / "job.json").read_text())
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (note["status"], note["error"]) == (word, f"The sweep was {word} in this job")
    assert "generated_image_0.png" in note["files"]
    assert f"| {word}: The sweep was {word} in this job |" in (tmp_path / "table.md").read_text()
