"""Brings outputs of two corresponding modules to the same shape and computes their error.

Our modules and diffusers' use different layouts. The following count as the same output:

- a tuple in another order or with more elements: tensors are matched by shape, and others are ignored;
- one of our tensors for several of theirs, concatenated (text and image tokens; query, key and value);
- a leading dimension for one timestep, in modules that compute all steps at once;
- one of our rows where diffusers repeats the row for the whole batch;
- an image [B, C, h, w] as tokens [B, h w, C], where our linear layer replaces a 1 x 1 convolution;
- heads before tokens [B, H, L, D] or after them [B, L, H, D].

If several layouts fit, the one with the smallest error counts: shapes cannot tell image tokens from text tokens if
there are equally many.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

MOST_TENSORS = 4  # outputs with more tensors are not matched, since all orders are tried


@dataclass(frozen=True)
class Partner:
    """diffusers' values for one of our tensors, in our layout, and the relative error of ours."""

    theirs: Tensor
    error: float


def tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, including those in nested tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors(item)]
    return []


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b| of two tensors of the same shape; infinity if a value is not finite or b is all zeros."""
    a, b = ours.detach().double(), theirs.detach().to(ours.device).double()
    if torch.equal(a, b):
        return 0.0
    largest, distance = b.abs().max().item(), (a - b).abs().max().item()
    return distance / largest if largest > 0 and math.isfinite(distance) else math.inf


def partners(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[int, Partner]:
    """Index of each of our tensors -> its partner; empty if the two outputs cannot be brought to the same shape."""
    if not ours or not theirs or max(len(ours), len(theirs)) > MOST_TENSORS:
        return {}
    if len(ours) == 1 and len(theirs) > 1:
        for joined in _joined(theirs):
            if (partner := _partner(ours[0], joined)) is not None:
                return {0: partner}
    known = {(i, j): _partner(our, their) for i, our in enumerate(ours) for j, their in enumerate(theirs)}
    count, assignments = min(len(ours), len(theirs)), list[dict[int, Partner]]()
    for places in permutations(range(len(ours)), count):
        for sources in permutations(range(len(theirs)), count):
            pairs = [(i, known[i, j]) for i, j in zip(places, sources, strict=True)]
            assignment = {i: partner for i, partner in pairs if partner is not None}
            assignments += [assignment] if len(assignment) == count else []
    return min(assignments, key=worst, default={})


def worst(partners: Mapping[int, Partner]) -> float:
    return max(partner.error for partner in partners.values())


def _joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors concatenated along the tokens and along the channels."""
    first = tensors[0]
    if any(tensor.ndim != first.ndim for tensor in tensors):
        return
    for dim in {1, first.ndim - 1} if first.ndim > 1 else ():
        if len({(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}) == 1:
            yield torch.cat(list(tensors), dim=dim)


def _partner(ours: Tensor, theirs: Tensor) -> Partner | None:
    """The layout with the smallest error among those in which both have the same shape; None if there is none."""
    candidates = []
    for their in _layouts(theirs):
        for our in _without_step(ours):
            if our.shape == their.shape:
                candidates.append(Partner(their.reshape(ours.shape), relative_error(our, their)))
            elif our.ndim == their.ndim and our.shape[0] == 1 and our.shape[1:] == their.shape[1:]:
                error = relative_error(our.expand(their.shape), their)
                candidates.append(Partner(their[:1].reshape(ours.shape), error))
    return min(candidates, key=lambda partner: partner.error, default=None)


def _without_step(ours: Tensor) -> Iterator[Tensor]:
    yield ours
    if ours.ndim > 2 and ours.shape[0] == 1:
        yield ours[0]


def _layouts(theirs: Tensor) -> Iterator[Tensor]:
    yield theirs
    if theirs.ndim == 4:
        yield theirs.flatten(2).transpose(1, 2)
        yield theirs.transpose(1, 2)
