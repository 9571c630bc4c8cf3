"""Benchmarks one denoising step on one rank and on two, with one thread each, interleaved.

    python -m tools.bench.ranks                     # networks that suit a laptop
    python -m tools.bench.ranks --work dit --rounds 9 --dtype bfloat16

A round is one step of every layout, all with the same weights; a step ends when both ranks have its result. Efficiency
is the time on one rank divided by twice the time on two ranks. `cfg2` computes half of the batch on each rank. Before
the benchmark the result of every layout is compared with that of one rank.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.engine import attention_kernels
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.parallel import mesh
from sglang_gen.parallel.collectives import gather
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sharded_network import Split
from sglang_gen.perf.statistics import judge
from sglang_gen.types import Layout
from sglang_gen.weights.load import load
from tools.bench import works

LAYOUTS = {"tp2": Layout(tp=2), "ulysses2": Layout(ulysses=2), "ring2": Layout(ring=2)}
ALONE, CFG = "one rank", "cfg2"
Step = Callable[[], Tensor]


def steps(work: works.Work, folder: Path, dtype: torch.dtype, pair: Mesh) -> dict[str, Step]:
    """A step of each layout, by the layout's name."""
    network, condition, latents = works.ours(work, folder, dtype, "cpu")
    alone = condition(network)
    by_layout: dict[str, Step] = {ALONE: lambda: network(latents, alone, 0)}
    if work.batch == 2:
        by_layout[CFG] = _halved(work, network, latents, pair)
    for name, layout in LAYOUTS.items():
        by_layout[name] = _split(work, folder, dtype, _with_layout(pair, layout), condition, latents)
    return by_layout


def _with_layout(pair: Mesh, layout: Layout) -> Mesh:
    """The mesh of the two ranks with another layout."""
    group = pair.groups["cfg"]
    return Mesh(layout, pair.rank, dict.fromkeys(("cfg", "ring", "ulysses", "sp", "tp"), group))


def _split(
    work: works.Work, folder: Path, dtype: torch.dtype, ranks: Mesh, condition: Callable[[Any], Any], latents: Tensor
) -> Step:
    family = work.pipeline
    split = Split(ranks, family.tensor_parallel, family.sharding)
    network = load(lambda: family.build(work.config), in_folder(folder), family.sources, dtype, "cpu", split.shrink)
    placed = split.parallelize(network)
    placed.set_kernel(scaled_dot_product_attention, attention_kernels.kernel_with_lse("sdpa", "cpu", dtype))
    conditioning = condition(placed.entrance)
    return lambda: placed.entrance(latents, conditioning, 0)


def _halved(work: works.Work, network: Any, latents: Tensor, pair: Mesh) -> Step:
    """A step with one row of the batch on each rank."""
    rows = slice(pair.rank, pair.rank + 1)
    _, *given = work.inputs(latents.dtype, "cpu")
    conditioning = works.conditioning(work, [tensor[rows] for tensor in given], network)

    def step() -> Tensor:
        return gather(network(latents[rows], conditioning, 0), pair.axis("cfg")).wait().flatten(0, 1)

    return step


def serve(rank: int, port: int, work: str, folder: Path, dtype: torch.dtype, rounds: int, pipe: Any) -> None:
    """The process of one rank: sends its seconds of every layout in every round."""
    torch.set_num_threads(1)
    pair = mesh.join(Layout(cfg=2), rank, port, "cpu")
    with torch.no_grad():
        by_layout = steps(works.WORKS[work](), folder, dtype, pair)
        expected = by_layout[ALONE]()
        for name, step in by_layout.items():
            error = ((step() - expected).abs().max() / expected.abs().max()).item()
            assert error < (1e-4 if dtype is torch.float32 else 0.1), f"{name} differs from one rank by {error:.2g}"
        seconds: dict[str, list[float]] = {name: [] for name in by_layout}
        for number in range(rounds):
            names = list(by_layout)[number % len(by_layout) :] + list(by_layout)[: number % len(by_layout)]
            for name in names:
                pair.barrier()
                start = time.perf_counter()
                if name != ALONE or rank == 0:
                    by_layout[name]()
                if name != ALONE:
                    pair.barrier()
                seconds[name].append(time.perf_counter() - start)
    mesh.leave()
    pipe.send(seconds)


def measure(work: str, folder: Path, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds by layout, measured on rank 0."""
    store: Any = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=serve, args=(rank, store.port, work, folder, dtype, rounds, pipes[rank][1]))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed")
    seconds: dict[str, list[float]] = pipes[0][0].recv()
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown table, one line per layout."""
    lines = ["| layout | ms (least to most) | efficiency (95 %) |", "|---|---|---|"]
    for name, values in seconds.items():
        verdict = judge(values, seconds[ALONE], tolerance=0.02)
        low, high = verdict.interval or (verdict.ratio, verdict.ratio)
        efficiency = f"{verdict.ratio / 2:.0%} ({low / 2:.0%} to {high / 2:.0%})" if name != ALONE else ""
        median, least, most = (1000 * value for value in (statistics.median(values), min(values), max(values)))
        lines.append(f"| {name} | {median:.0f} ({least:.0f} to {most:.0f}) | {efficiency} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=works.LAPTOP, help=f"of {', '.join(works.WORKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    for name in arguments.work.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = works.stored(works.WORKS[name](), Path(temporary))
            seconds = measure(name, folder, getattr(torch, arguments.dtype), arguments.rounds)
        print(f"\n## {works.WORKS[name]().title}, {arguments.dtype}\n\n{table(seconds)}", flush=True)


if __name__ == "__main__":
    main()
