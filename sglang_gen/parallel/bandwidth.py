"""Measures the bandwidth between ranks."""

import time

import torch
import torch.distributed as dist

SIZE = {"cpu": 2**24, "cuda": 2**28}  # bytes: about the traffic of a layer; large enough to hide kernel launches
REPEATS = 5


def gb_per_s(device: str) -> float:
    """Bandwidth in 10^9 bytes per second that leave this rank in the fastest of several all-reduces. Collective."""
    ranks, tensor = dist.get_world_size(), torch.zeros(SIZE[device] // 4, device=device)
    seconds = []
    for _ in range(REPEATS + 1):  # the first is a warm-up
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])  # waits for the result on a GPU
        seconds.append(time.perf_counter() - start)
    return round(2 * (ranks - 1) / ranks * SIZE[device] / min(seconds[1:]) / 1e9, 3)
