"""Both autoencoders on the latents that diffusers' was given, module by module."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.debug import networks
from sglang_gen.debug.correspondence import correspond
from sglang_gen.debug.networks import Compared, Networks
from sglang_gen.debug.verdict import Cause
from sglang_gen.families import autoencoder as autoencoder


def beside(ours: nn.Module, theirs: nn.Module, tolerance: float) -> Networks:
    """Two autoencoders with their modules matched."""
    return Networks(ours, theirs, correspond(ours, theirs, autoencoder.sources), tolerance, stage="decoder")


@torch.no_grad()
def compare(pair: Networks, latents: Tensor | None) -> tuple[Compared, Cause | None]:
    """The rows of all modules that decode, and where to look; none where diffusers came to no latents to decode."""
    if latents is None:
        return Compared([], ()), None
    ours, theirs = (partial(_decode, vae, latents) for vae in (pair.ours, pair.theirs))
    with _as(latents.dtype, pair.ours), _as(latents.dtype, pair.theirs):
        compared = networks.compare(pair, ours, theirs)
        return compared, networks.cause(pair, ours, theirs, compared.rows)


def _decode(vae: Any, latents: Tensor) -> object:
    found: object = vae.decode(latents)
    return found


@contextmanager
def _as(dtype: torch.dtype, vae: nn.Module) -> Iterator[None]:
    """The autoencoder in this dtype inside: pipelines change that of one that overflows while it decodes."""
    before = next(vae.parameters()).dtype
    nn.Module.to(vae, dtype)  # that of diffusers warns
    try:
        yield
    finally:
        nn.Module.to(vae, before)
