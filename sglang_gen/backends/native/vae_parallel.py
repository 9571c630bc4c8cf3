"""Parallel VAE decoding: each rank of the sequence parallel group decodes some rows of the image.

The tensors of one level do not fit into the gaps that the smaller tensors of the level before left in the heap, so on a
CPU these gaps return to the operating system before a level is computed.
"""

from typing import Any

import torch

from sglang_gen.engine.freed_memory import return_freed_memory_before
from sglang_gen.models.vae import Level
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.spatial import RowDecoder


def split(vae: Any, axis: Axis) -> Any:
    """Shard the decoder over the ranks of `axis`; every rank keeps the whole encoder."""
    for module in vae.modules():
        if isinstance(module, Level):
            return_freed_memory_before(module)
    if axis.size > 1:
        vae.decoder = RowDecoder(vae.decoder, axis)
    return vae


def meta_copy(vae: Any, axis: Axis, dtype: torch.dtype) -> Any:
    """A copy of this rank's shard of the autoencoder on the meta device."""
    kind: Any = type(vae)
    with torch.device("meta"):
        return split(kind(vae.config).to(dtype), axis)
