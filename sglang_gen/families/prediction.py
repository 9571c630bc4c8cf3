"""From encoded texts to what predicts: the network with everything that all steps share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.denoise import Predict


def joined(encoded: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The encoded texts of several branches as one batch."""
    return tuple(torch.cat(part) for part in zip(*encoded, strict=True))


def predictor(network: Any, *conditions: Any) -> Predict:
    """What predicts from the latents; `conditions` are what the network's `condition` takes."""
    conditioning = network.condition(*conditions)

    def predict(latents: Tensor, step: int) -> Tensor:
        prediction: Tensor = network(latents, conditioning, step)
        return prediction

    return predict


def guidance_scale(guidance: float, true_cfg: float, negative: bool) -> float:
    """The scale of classifier-free guidance, where --guidance-scale is that."""
    return guidance
