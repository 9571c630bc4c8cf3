"""The networks of the report: those of `tools.bench.works`, with random weights that are drawn on the device."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_gen.families import registry
from tools.bench import works
from tools.gpu_first.sections import Settings

NAMES = tuple(name for name, (_, benchmark) in works.BENCHMARKS.items() if benchmark.preset)  # of published networks
SIDE = 8  # of a tiny network's latents


def chosen(settings: Settings) -> Mapping[str, works.Work]:
    """The networks by name: as published, or with the configs of the tiny pipelines."""
    found = {name: works.WORKS[name]() for name in NAMES}
    if settings.size == "full":
        return found
    return {
        name: dataclasses.replace(
            work, title=f"a tiny {name}", config=registry.examples(work.spec).tiny, tokens=7, size=SIDE
        )
        for name, work in found.items()
    }


def dtype(settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.gpu else torch.float32


@torch.no_grad()
def drawn(work: works.Work, settings: Settings) -> tuple[Any, Callable[..., Any], Tensor]:
    """Our network, a function for its conditioning, and the latents, as `works.ours` returns them."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype(settings))
    try:
        with torch.device(settings.device):
            network = work.pipeline.build(work.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for buffer in network.buffers():
        buffer.normal_()  # a table that a checkpoint would fill
    latents, *given = work.inputs(dtype(settings), settings.device)
    return network, partial(works.conditioning, work, given), latents
