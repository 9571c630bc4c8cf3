"""Refuses latents and outputs that are not finite: they would be saved as black images or silent audio."""

import torch

from sglang_gen.errors import RunError
from sglang_gen.types import Sample


def require_finite(values: torch.Tensor | None, what: str, batch: tuple[Sample, ...]) -> None:
    """Raise RunError for NaN or infinity in `values` `[B, ...]`, naming the sample."""
    if values is None or values.shape[0] != len(batch):
        return
    for row, sample in zip(values, batch, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise RunError(
                f"There are NaN or infinite values in {what} of sample {sample.index} (seed {sample.seed}), so the "
                "result would be black or silent; try --dtype float32 (or bfloat16 in place of float16)"
            )
