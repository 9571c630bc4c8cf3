"""Measures the bandwidth between ranks."""

import time

import torch
import torch.distributed as dist

from sglang_gen.parallel.collectives import all_reduce
from sglang_gen.parallel.mesh import AXES, Mesh

SIZE = {"cpu": 2**22, "cuda": 2**28}  # bytes: about the traffic of a layer; large enough to hide kernel launches
REPEATS = 12  # the first messages of CPU ranks touch memory that they have not used before


def gb_per_s(mesh: Mesh, device: str) -> float:
    """Bandwidth of the fastest of several all-reduces along the axis with most ranks, in 10^9 bytes per second.

    An all-reduce over n ranks counts as 2 (n - 1) / n of the tensor. Collective.
    """
    axis = max((mesh.axis(name) for name in AXES), key=lambda each: each.size)
    tensor = torch.zeros(SIZE[device] // 4, device=device)
    seconds = []
    for _ in range(REPEATS + 1):  # the first is a warm-up
        dist.barrier()
        start = time.perf_counter()
        total = all_reduce(tensor, axis)
        float(total[0])  # waits for the result on a GPU
        seconds.append(time.perf_counter() - start)
    return round(2 * (axis.size - 1) / axis.size * SIZE[device] / min(seconds[1:]) / 1e9, 3)
