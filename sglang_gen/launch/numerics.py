"""torch's numeric switches during a run: determinism if requested, no TF32 for float32, timed convolutions in half."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def settled(dtype: str, deterministic: bool) -> Iterator[None]:
    """Context that sets torch's switches for a run in this dtype and restores them on exit.

    cuDNN times its convolution algorithms for each shape, in half precision: the algorithms differ in rounding, so a
    deterministic run takes the one that cuDNN's rules name, and float32 keeps it to round like diffusers.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if before is not deterministic:  # avoids the call, which imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)
    rounded = torch.backends.cudnn.allow_tf32  # on by default: float32 convolutions on a GPU use TF32 (10-bit mantissa)
    torch.backends.cudnn.allow_tf32 = rounded and dtype != "float32"
    timed = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not deterministic and (timed or dtype != "float32")
    try:
        yield
    finally:
        if before is not deterministic:
            torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.allow_tf32 = rounded
        torch.backends.cudnn.benchmark = timed
