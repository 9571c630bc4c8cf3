"""How fast ranks hand over what they have: measured, as the other rates of a machine are."""

import time

import torch
import torch.distributed as dist

SIZE = {"cpu": 2**24, "cuda": 2**28}  # bytes: about what a layer sends, and what hides the start of a kernel
REPEATS = 5


def gb_per_s(device: str) -> float:
    """10^9 bytes a second that leave this rank while all ranks sum a tensor: the fastest of some sums. Collective."""
    ranks, tensor = dist.get_world_size(), torch.zeros(SIZE[device] // 4, device=device)
    seconds = []
    for _ in range(REPEATS + 1):  # the first is not counted
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])  # on a GPU the sum may be on its way
        seconds.append(time.perf_counter() - start)
    return round(2 * (ranks - 1) / ranks * SIZE[device] / min(seconds[1:]) / 1e9, 3)
