"""Comparing a network of ours with the diffusers class that has the same weights."""

from pathlib import Path

import torch
from torch import nn

from sglang_gen.weights.load import load, weight_files


def exact_norms(network: nn.Module) -> nn.Module:
    """diffusers' RMSNorm computes in float32 whatever its dtype; torch's in its place, with the same weights."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "RMSNorm" and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.eps, dtype=child.weight.dtype)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return network


def pair(reference: nn.Module, glue, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(diffusers' network, ours) with the weights of `reference`, which are saved to `folder` on the way."""
    reference.save_pretrained(folder)
    config = dict(reference.config)
    ours = load(lambda: glue.build(config), weight_files(folder), glue.sources, dtype, "cpu")
    theirs = type(reference).from_pretrained(folder, dtype=dtype)
    return exact_norms(theirs) if dtype is torch.float64 else theirs, ours


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
