"""The command under launchers of ranks: torchrun, or anything that sets its variables."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from rank_runs import SIZE

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
COMMAND = ["-m", "sglang_gen", "generate"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(words: list[str], folder: str = ".", **variables: object) -> subprocess.Popen:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in variables.items()}}
    return subprocess.Popen([*map(str, words)], cwd=folder, env=settings, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(*processes: subprocess.Popen) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines of all that are ours."""
    said = [process.communicate(timeout=240) for process in processes]
    lines = [line for out, err in said for line in (out + err).splitlines()]
    ours = [line for line in lines if line.startswith(("INFO: ", "WARNING: ", "ERROR: "))]
    return [process.returncode for process in processes], ours


def words(model: Path, *more: object) -> list[object]:
    return ["--model-path", model, "--prompt", "a cat", *SIZE, "--num-inference-steps", 2, "output.latents=true", *more]
