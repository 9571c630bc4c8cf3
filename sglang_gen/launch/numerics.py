"""How torch computes during a run: reproducibly where that is asked for, and in float32 with all bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def settled(dtype: str, deterministic: bool) -> Iterator[None]:
    """Inside, torch's switches are as a run in this dtype wants them; afterwards as they were."""
    before = torch.are_deterministic_algorithms_enabled()
    if before is not deterministic:  # the call imports all of torch's compiler
        torch.use_deterministic_algorithms(deterministic)
    rounded = torch.backends.cudnn.allow_tf32  # by default convolutions in float32 keep ten bits on a GPU
    torch.backends.cudnn.allow_tf32 = rounded and dtype != "float32"
    try:
        yield
    finally:
        if before is not deterministic:
            torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.allow_tf32 = rounded
