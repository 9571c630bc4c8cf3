"""Data parallel training under torchrun: every rank has its own batch, and gradients are averaged.

On a CPU one single-threaded process per core is faster than one process with many threads.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def join() -> tuple[int, int]:
    """Rank and number of ranks; (0, 1) without torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average all gradients with one all-reduce in bfloat16."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients]).bfloat16()
    dist.all_reduce(flat)
    flat = flat.float() / dist.get_world_size()
    for gradient, values in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))


def broadcast_shards(shards: list[list[nn.Parameter]]) -> None:
    """Broadcast the weights `shards[r]` that rank r has updated, for all ranks r."""
    if not dist.is_initialized():
        return
    for owner, shard in enumerate(shards):
        flat = torch.cat([p.data.flatten() for p in shard])
        dist.broadcast(flat, src=owner)
        for parameter, values in zip(shard, flat.split([p.numel() for p in shard]), strict=True):
            parameter.data.copy_(values.view_as(parameter))
