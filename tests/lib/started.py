"""The command as a process of its own, which a signal can reach."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# A shell starts background jobs with SIGINT ignored, which children inherit; the terminal's child does not.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", file=sys.stderr, flush=True)
sys.argv[0] = "sglang"
from sglang_gen.cli import console
console()
"""


ROOT = str(Path(__file__).parents[2])


def started(words: list[str]) -> subprocess.Popen:
    """`sglang generate WORDS...` in a session of its own, which stands for a terminal; first it says `ready`."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "generate", *words], env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def generating(words: list[str]) -> subprocess.Popen:
    """The same after its first picture."""
    process = started(words)
    lines: list[str] = []
    while not (lines and lines[-1].startswith("INFO: Generated image saved to: ")):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    return process


def ending(process: subprocess.Popen) -> tuple[str, str]:
    """What the process still prints until it ends; killed with its children if it does not."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`; threads are not among them."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if parent(path) == pid]


def parent(stat: Path) -> int | None:
    """The parent of the process of a `/proc/PID/stat`; None for one that ended while we looked."""
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def said(rest: str) -> list[str]:
    """The lines of standard error that are no mere information."""
    return [line for line in rest.splitlines() if not line.startswith("INFO: ")]


def gone(pids: list[int], within: float) -> bool:
    """Whether no process of these is there any more, at the latest after so many seconds."""
    until = time.monotonic() + within
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
