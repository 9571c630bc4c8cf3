"""Turns a network and encoded prompts into a `Predict` function for the sampling loop."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sglang_gen.engine.denoise import Predict


def joined(encoded: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the encoded prompts of several guidance branches into one batch.

    A boolean tensor `[B, T]` is the mask of the text `[B, T, ...]` before it (see `Spec.text_masks`). Both are padded
    to the longest branch: the text with zeros, the mask with False.
    """
    parts = list(zip(*encoded, strict=True))
    masks = [part[0].dtype == torch.bool for part in parts]
    padded = [own or following for own, following in zip(masks, [*masks[1:], False], strict=True)]
    return tuple(torch.cat(_padded(part) if pad else part) for part, pad in zip(parts, padded, strict=True))


def _padded(texts: Sequence[Tensor]) -> list[Tensor]:
    """`[B, T, ...]` of every branch, padded with zeros to the longest T."""
    longest = max(text.shape[1] for text in texts)
    return [F.pad(text, (0, 0) * (text.ndim - 2) + (0, longest - text.shape[1])) for text in texts]


def without_text(encoded: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zeros in place of encoded prompts. Masks stay, so that as many tokens of zeros are attended to."""
    return tuple(tensor if tensor.dtype == torch.bool else torch.zeros_like(tensor) for tensor in encoded)


def predictor(network: Any, *conditions: Any) -> Predict:
    """The network's prediction as a function of latents and step; `conditions` are arguments of `network.condition`."""
    conditioning = network.condition(*conditions)

    def predict(latents: Tensor, step: int) -> Tensor:
        prediction: Tensor = network(latents, conditioning, step)
        return prediction

    return predict
