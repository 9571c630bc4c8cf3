"""Copies from the host to the GPU that do not make the host wait.

A copy from pageable memory waits until the GPU has finished everything that is queued before it, so a scheduler that
draws noise on the CPU would leave the GPU idle at every step. A copy from pinned memory is queued like a kernel.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PinnedCopies(TorchFunctionMode):
    """Inside the context `tensor.to("cuda")` of a CPU tensor copies from pinned memory, also in other libraries."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.to or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        device, dtype, _, memory_format = torch._C._nn._parse_to(
            *args[1:], **{name: value for name, value in kwargs.items() if name != "copy"}
        )
        if device is None or device.type != "cuda" or memory_format is not None:
            return func(*args, **kwargs)
        source = args[0].to(dtype or args[0].dtype)  # a conversion on the way would need a pageable copy
        return source.pin_memory().to(device, non_blocking=True)


def pinned_copies(device: torch.device) -> AbstractContextManager[Any]:
    """`PinnedCopies` if `device` is a GPU; on a CPU nothing is copied."""
    return PinnedCopies() if device.type == "cuda" else nullcontext()
