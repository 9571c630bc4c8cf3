"""Memory formats: convolutions, and images on their way to the host."""

import torch
from torch import Tensor, nn


def to_channels_last(network: nn.Module) -> None:
    """Convert the weights of convolutions to channels_last."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pixel_values(decoded: Tensor) -> Tensor:
    """Decoded values in -1..1 as float32 in 0..1."""
    return (decoded * 0.5 + 0.5).clamp(0, 1).float()


def to_bytes(values: Tensor) -> Tensor:
    """Values in 0..1 as uint8, rounded half to even; on their device, so that a quarter of the bytes leaves it."""
    return (values * 255).round().to(torch.uint8)
