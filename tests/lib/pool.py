"""One pool of gloo ranks for all tests of parallelism: processes that run a function on a mesh of any layout."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import forks

from sglang_gen.types import Layout

RANKS = 8
PATIENCE = 120.0  # seconds: ranks of a loaded machine take long to start


class Pool:
    """`RANKS` processes of one thread each."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.store: Any = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        forks.preload()
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, layout: Layout, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(mesh, *args)` on every rank of the layout; what each returns. The function is a module's own."""
        from sglang_gen.parallel import mesh

        if layout != self.layout:
            self.store = mesh.local_store()
            self.layout = layout
        for pipe in self.pipes[: layout.ranks]:
            pipe.send((layout, self.store.port, function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes[: layout.ranks]):
            answers.append(pipe.recv() if pipe.poll(PATIENCE) else f"rank {rank} hangs")
            if isinstance(answers[-1], str):  # the others wait for it, so none is of use any more
                self.close()
                self._start()
                self.layout = None
                raise AssertionError(answers[-1])
        return [value for (value,) in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from sglang_gen.parallel import mesh

    torch.set_num_threads(1)
    joined, port = None, None
    while True:
        try:
            layout, wanted, function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if joined is None or wanted != port:
                mesh.leave()
                joined, port = mesh.join(layout, rank, wanted, "cpu"), wanted
            with torch.no_grad():
                answer: Any = (function(joined, *args),)
        except Exception:  # noqa: BLE001 - the test shows it
            answer = f"rank {rank}: {traceback.format_exc()}"
        pipe.send(answer)
