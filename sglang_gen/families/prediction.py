"""Turns a network and encoded prompts into a `Predict` function for the sampling loop."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.denoise import Predict


def joined(encoded: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the encoded prompts of several guidance branches into one batch."""
    return tuple(torch.cat(part) for part in zip(*encoded, strict=True))


def predictor(network: Any, *conditions: Any) -> Predict:
    """The network's prediction as a function of latents and step; `conditions` are arguments of `network.condition`."""
    conditioning = network.condition(*conditions)

    def predict(latents: Tensor, step: int) -> Tensor:
        prediction: Tensor = network(latents, conditioning, step)
        return prediction

    return predict
