"""Data parallel training under torchrun: every rank draws its own batch, gradients are averaged.

On a CPU one process with one thread per core is faster than one process with many threads.
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
    """One all-reduce of all gradients, in bfloat16."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients]).bfloat16()
    dist.all_reduce(flat)
    flat = flat.float() / dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def exchange(shares: list[list[nn.Parameter]]) -> None:
    """Give every rank the weights that rank r has just updated, its share `shares[r]`."""
    if not dist.is_initialized():
        return
    for owner, share in enumerate(shares):
        flat = torch.cat([p.data.flatten() for p in share])
        dist.broadcast(flat, src=owner)
        for parameter, part in zip(share, flat.split([p.numel() for p in share]), strict=True):
            parameter.data.copy_(part.view_as(parameter))
