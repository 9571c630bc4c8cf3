"""Compares both autoencoders module by module on the latents that diffusers decoded."""

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
    """The rows of all decoder modules, and the cause of the first difference; empty if diffusers decoded nothing."""
    if latents is None:
        return Compared([], ()), None
    ours, theirs = (partial(_decode, vae, latents) for vae in (pair.ours, pair.theirs))
    with _as(latents.dtype, pair.ours), _as(latents.dtype, pair.theirs):
        compared = networks.compare(pair, ours, theirs)
        return compared, networks.cause(pair, ours, theirs, compared.rows)


def _decode(vae: Any, latents: Tensor) -> object:
    decoded: object = vae.decode(latents)
    return decoded


@contextmanager
def _as(dtype: torch.dtype, vae: nn.Module) -> Iterator[None]:
    """Within this context the autoencoder has this dtype: pipelines upcast some autoencoders to decode."""
    before = next(vae.parameters()).dtype
    nn.Module.to(vae, dtype)  # the `to` of diffusers' ModelMixin warns
    try:
        yield
    finally:
        nn.Module.to(vae, before)
