"""Outputs of two modules that mean the same, brought to one shape and measured against each other.

Ours and diffusers' lay the same numbers out differently. These are all the ways that count as the same:

- a tuple in another order, or with more in it: tensors find their partner by shape, and what is left over is ignored;
- one tensor of ours for several of theirs that follow each other (text and image tokens; query, key and value);
- an axis of one timestep in front, which modules have that compute all steps at once;
- one row of ours where theirs repeats it for every row of the batch;
- a picture [B, C, h, w] as tokens [B, h w, C], where a convolution of one pixel is a linear layer of ours;
- heads before tokens [B, H, L, D] or behind [B, L, H, D].

Where more than one way fits, the one with the smallest error counts: shapes alone cannot tell image from text tokens
where both are as many.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

MOST_TENSORS = 4  # tensors of one output whose orders are tried


@dataclass(frozen=True)
class Partner:
    """Their numbers for one tensor of ours, in our layout, and how far ours are from them."""

    theirs: Tensor
    error: float


def tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, through tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors(item)]
    return []


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b| of two tensors of one shape; infinity where a number is not finite or all of b is zero."""
    a, b = ours.detach().double(), theirs.detach().to(ours.device).double()
    if torch.equal(a, b):
        return 0.0
    largest, distance = b.abs().max().item(), (a - b).abs().max().item()
    return distance / largest if largest > 0 and math.isfinite(distance) else math.inf


def partners(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[int, Partner]:
    """For each tensor of ours, by its place, its partner; empty where the two outputs are not brought to one shape."""
    if not ours or not theirs or max(len(ours), len(theirs)) > MOST_TENSORS:
        return {}
    if len(ours) == 1 and len(theirs) > 1:
        for joined in _joined(theirs):
            if (partner := _partner(ours[0], joined)) is not None:
                return {0: partner}
    known = {(i, j): _partner(mine, its) for i, mine in enumerate(ours) for j, its in enumerate(theirs)}
    count, found = min(len(ours), len(theirs)), list[dict[int, Partner]]()
    for places in permutations(range(len(ours)), count):
        for sources in permutations(range(len(theirs)), count):
            pairs = [(i, known[i, j]) for i, j in zip(places, sources, strict=True)]
            whole = {i: partner for i, partner in pairs if partner is not None}
            found += [whole] if len(whole) == count else []
    return min(found, key=worst, default={})


def worst(found: Mapping[int, Partner]) -> float:
    return max(partner.error for partner in found.values())


def _joined(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """The parts one behind the other, as tokens and as channels."""
    first = parts[0]
    if any(part.ndim != first.ndim for part in parts):
        return
    for axis in {1, first.ndim - 1} if first.ndim > 1 else ():
        if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) == 1:
            yield torch.cat(list(parts), dim=axis)


def _partner(ours: Tensor, theirs: Tensor) -> Partner | None:
    """The closest of all the ways in which the two have one shape; None where there is none."""
    found = []
    for its in _layouts(theirs):
        for mine in _without_step(ours):
            if mine.shape == its.shape:
                found.append(Partner(its.reshape(ours.shape), relative_error(mine, its)))
            elif mine.ndim == its.ndim and mine.shape[0] == 1 and mine.shape[1:] == its.shape[1:]:
                error = relative_error(mine.expand(its.shape), its)
                found.append(Partner(its[:1].reshape(ours.shape), error))
    return min(found, key=lambda partner: partner.error, default=None)


def _without_step(ours: Tensor) -> Iterator[Tensor]:
    yield ours
    if ours.ndim > 2 and ours.shape[0] == 1:
        yield ours[0]


def _layouts(theirs: Tensor) -> Iterator[Tensor]:
    yield theirs
    if theirs.ndim == 4:
        yield theirs.flatten(2).transpose(1, 2)
        yield theirs.transpose(1, 2)
