"""Comparing a network of ours with the diffusers class that has the same weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sglang_gen.hub.component_folder import in_folder
from sglang_gen.weights.load import load


def exact_norms(network: nn.Module) -> nn.Module:
    """diffusers' RMSNorm computes in float32 whatever its dtype; torch's in its place, with the same weights."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "RMSNorm" and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.eps, dtype=child.weight.dtype)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return network


def pair(reference: nn.Module, family, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(diffusers' network, ours) with the weights of `reference`, which are saved to `folder` on the way."""
    reference.save_pretrained(folder)
    config = dict(reference.config)
    ours = load(lambda: family.build(config), in_folder(folder), family.sources, dtype, "cpu")
    theirs = type(reference).from_pretrained(folder, dtype=dtype)
    return exact_norms(theirs) if dtype is torch.float64 else theirs, ours


Pairs = Callable[[dict, torch.dtype], tuple[nn.Module, nn.Module]]


def pairs_of(reference: Callable[..., nn.Module], glue, folders: pytest.TempPathFactory) -> Pairs:
    """A function that gives the `pair` of a configuration in a dtype, made once: who breaks a network takes a copy."""
    made: dict[str, tuple[nn.Module, nn.Module]] = {}

    def networks(config: dict, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        key = f"{dtype} {config}"
        if key not in made:
            made[key] = pair(reference(**config), glue, folders.mktemp("network"), dtype)
        return made[key]

    return networks


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(pairs: Pairs, config: dict, inputs, ours, theirs, steps: int) -> None:
    """In float64 both compute the same to 1e-10.

    In float32 to 1e-5, or to three times what diffusers' own rounding is where that is more: processors round in
    different orders, and some of these networks make a thousand times as much of it.
    """
    exact = []
    for dtype in (torch.float64, torch.float32):
        their, our = pairs(config, dtype)
        given = inputs(config, dtype)
        for step in range(steps):
            output, expected = ours(our, *given, step=step), theirs(their, *given, step=step)
            if dtype is torch.float64:
                exact.append(expected)
            rounding = 3 * error(expected.double(), exact[step])
            assert error(output, expected) <= (1e-10 if dtype is torch.float64 else max(1e-5, rounding))
