"""Whole runs on rank processes: the processes, and their pictures beside those of one process."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import forks
import numpy as np
from PIL import Image
from safetensors.torch import load_file

from sglang_gen.launch import launcher, worker

ALWAYS = ("--seed", "7", "--dtype", "float32")
SIZE = ("--height", "32", "--width", "32", *ALWAYS)


class Forked(ForkServerProcess):
    """A rank's process that a server forks, with the methods of a `subprocess.Popen` that the launcher calls."""

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
        return self.exitcode


class ForkedRanks(launcher.Ranks):
    """Ranks forked from a process that has imported torch, diffusers and the engine: one that imports them itself
    takes 6 CPU seconds to start. Tests of the start itself use `launcher.Ranks`.
    """

    def _start(self, environment: dict[str, str]) -> None:
        ours, theirs = Pipe()
        process = Forked(target=_work, args=(theirs, environment), daemon=True)
        forks.preload()
        process.start()
        theirs.close()
        self.pipes.append(ours)
        self.processes.append(process)


def _work(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["rank", str(os.dup(pipe.fileno())), str(os.getppid())]
    pipe.close()
    sys.exit(worker.main())


class Processes:
    """Rank processes that the tests of a session share, made anew after a failure."""

    def __init__(self) -> None:
        self.ranks: launcher.Ranks | None = None

    @contextmanager
    def open(self, count: int, device: str):
        running = [process.poll() is None for process in self.ranks.processes] if self.ranks else []
        if not all(running) or len(running) < count:
            self.close()
            self.ranks = ForkedRanks(count, device)
        try:
            yield self.ranks
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.ranks:
            self.ranks.stop()
        self.ranks = None


def latents(folder: str, number: int) -> np.ndarray:
    return load_file(f"{folder}/generated_image_{number}.safetensors")["latents"].double().numpy()


def picture(folder: str, number: int) -> np.ndarray:
    return np.asarray(Image.open(f"{folder}/generated_image_{number}.png")).astype(int)


def record(folder: str, number: int = 0) -> dict:
    return json.loads(Path(f"{folder}/generated_image_{number}.json").read_text())


def assert_same(ours: str, reference: str, count: int) -> None:
    """Latents to 1e-5 relative, pictures to one level, seeds in order."""
    assert len(list(Path(ours).glob("*.png"))) == count
    for number in range(count):
        a, b = latents(ours, number), latents(reference, number)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
        a, b = (
            np.asarray(Image.open(f"{where}/generated_image_{number}.png")).astype(int) for where in (ours, reference)
        )
        assert np.abs(a - b).max() <= 1
        assert record(ours, number)["sample"] == record(reference, number)["sample"]


def assert_as_predicted(stage: dict) -> None:
    """In this stage of a dump's `comm` everything that was sent was expected."""
    for sent in stage["collectives"].values():
        assert (sent["count"], sent["bytes"]) == (sent["predicted_count"], sent["predicted_bytes"])


def assert_every_rank_as_predicted(dump: dict, count: int) -> None:
    """So it is in every stage of each of so many ranks, all of which evaluate the network equally often."""
    assert [rank["rank"] for rank in dump["ranks"]] == list(range(count))
    assert dump["ranks"][0]["comm"] == dump["comm"]
    for rank in dump["ranks"]:
        assert rank["comm"]["denoising"]["collectives"]
        assert rank["comm"]["denoising"]["evaluations"] == dump["comm"]["denoising"]["evaluations"]
        for stage in rank["comm"].values():
            assert_as_predicted(stage)
