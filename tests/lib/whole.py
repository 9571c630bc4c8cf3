"""Whole runs on the ranks of the pool: what happens on each of them beside the pictures."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from repeated import Repeated
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_gen import log
from sglang_gen.backends.native.engine import NativeEngine
from sglang_gen.config.choices import Choices
from sglang_gen.config.compose import compose
from sglang_gen.dry_run import traffic
from sglang_gen.engine import cuda_graphs
from sglang_gen.hub import resolve
from sglang_gen.launch import rank
from sglang_gen.parallel import shared_memory
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.plan import checks, make
from sglang_gen.types import Plan


def plan_of(*words: object) -> Plan:
    """The plan of a run of a tiny pipeline; unless `words` say otherwise, of the native engine in float32."""
    usual = ("dtype=float32", "backend=sglang", "output.latents=true", "sampling.height=32", "sampling.width=32",
             "sampling.num_inference_steps=2", "sampling.seed=7")  # fmt: skip
    given = {word.partition("=")[0]: word for word in (*usual, *map(str, words))}
    composed = compose(Choices(tuple(given.values())))
    checks.check_request(composed)
    return make.make_plan(composed, resolve.find(composed.run.model, weights=True))


class Operators(TorchDispatchMode):
    """Counts the operators of torch.distributed, whoever calls them, and those that read tensors on meta."""

    def __init__(self, counts: Counter[str], on_meta: Counter[str]) -> None:
        super().__init__()
        self.counts, self.on_meta = counts, on_meta

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        self.on_meta[func._opname] += any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves(args))
        return func(*args, **(kwargs or {}))


def through_shared_memory() -> int:
    """Collectives of this process that did not call torch.distributed."""
    return sum(channel.started for channel in shared_memory._channels.values())


@dataclass
class Happened:
    """On one rank."""

    sampling: Counter[str] = field(default_factory=Counter)  # collectives between a batch's prompts and its frames
    on_meta: Counter[str] = field(default_factory=Counter)  # operators there that trace and do not compute
    gathers: Counter[str] = field(default_factory=Counter)  # of objects, by axis
    order: list[str] = field(default_factory=list)  # batches are "sampled", their traffic is "predicted"
    report: dict[str, Any] = field(default_factory=dict)  # of rank 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of captured evaluations
    replays: int = 0


def generated(mesh: Mesh, planned: Plan) -> Happened:
    """Carry out the plan on this rank, with a stand-in for graphs where it has them."""
    found = Happened()
    recorders: list[Repeated] = []
    sample, gather, predict = NativeEngine.sample, Mesh.gather, traffic.predict

    def sampled(*args: Any) -> Any:
        found.order.append("sampled")
        before = through_shared_memory()
        with Operators(found.sampling, found.on_meta):
            decoded = sample(*args)
        if after := through_shared_memory() - before:
            found.sampling["shared memory"] += after
        return decoded

    def predicted(*args: Any) -> Any:
        found.order.append("predicted")
        return predict(*args)

    def gathered(self: Mesh, item: Any, axis: str) -> Any:
        found.gathers[axis] += 1
        return gather(self, item, axis)

    log.setup("error")
    with (
        patch.object(NativeEngine, "sample", sampled),
        patch.object(Mesh, "gather", gathered),
        patch.object(traffic, "predict", predicted),
        patch.object(cuda_graphs, "Recorder", Repeated),
        patch.object(Repeated, "made", recorders, create=True),
    ):
        result = rank.run(planned, mesh, time.perf_counter())
    found.report = result.report if result else {}
    found.shapes = [shape for each in recorders for shape in each.shapes]
    found.replays = sum(each.replays for each in recorders)
    return found
