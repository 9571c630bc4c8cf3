"""Decoding by the ranks of a split sequence together: each decodes some rows of the picture."""

from typing import Any

import torch

from sglang_gen.parallel.collectives import Axis, Traffic, counted
from sglang_gen.parallel.spatial import RowDecoder


def split(vae: Any, axis: Axis) -> Any:
    """The autoencoder with its decoder over the ranks of `axis`; the encoder stays whole on each."""
    if axis.size > 1:
        vae.decoder = RowDecoder(vae.decoder, axis)
    return vae


def twin(vae: Any, axis: Axis, dtype: torch.dtype) -> Any:
    """This rank's part of an autoencoder like this one, without memory."""
    kind: Any = type(vae)
    with torch.device("meta"):
        return split(kind(vae.config).to(dtype), axis)


def expected(vae: Any, axis: Axis, dtype: torch.dtype, batch: int, size: tuple[int, int]) -> Traffic:
    """What decoding a batch of latents of this height and width sends."""
    if axis.size == 1:
        return Traffic()
    latents = torch.empty(batch, vae.config.channels, *size, dtype=dtype, device="meta")
    with counted() as traffic:
        twin(vae, axis, dtype).decode(latents)
    return traffic
