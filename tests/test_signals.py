"""Ctrl-C and SIGTERM in the middle of denoising: one sentence, the right exit code, and nothing left behind."""

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


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for children in /proc")
@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [(signal.SIGINT, 130, "ERROR: Interrupted"), (signal.SIGTERM, 143, "ERROR: Terminated")],
)
def test_a_signal_while_denoising_ends_the_run_cleanly(pipelines, tmp_path, number, code, sentence):
    """The first picture is finished, the second is being made; a session of its own stands for the terminal."""
    words = ["--model-path", str(pipelines["sd15"]), "--prompt", "a", "--height", "32", "--width", "32",
             "--num-samples", "99999", "--num-inference-steps", "50", "--output-path", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", "from sglang_gen.cli import console; console()", "generate", *words],
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
    assert process.returncode == code
    assert out == ""
    errors = [line for line in rest.splitlines() if not line.startswith("INFO: ")]
    assert errors == [sentence]
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    assert pictures
    assert names == pictures | {name.replace(".png", ".json") for name in pictures}
    assert all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in tmp_path.glob("*.png"))
