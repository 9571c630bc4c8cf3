"""The network that finds the attributes of an image: four convolutions and one linear layer for each attribute."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

GRID = 8  # the last feature map is averaged to GRID x GRID, so that positions stay visible


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> one tensor of logits [B, classes] for each attribute.

    `classes` has the number of values of each attribute.
    """

    def __init__(self, classes: Sequence[int], width: int) -> None:
        super().__init__()
        widths = [3, *(width * factor for factor in (1, 2, 3, 4))]
        stages = [stage(inputs, outputs) for inputs, outputs in pairwise(widths)]
        self.body = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(GRID), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(widths[-1] * GRID**2, count) for count in classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        return [head(features) for head in self.heads]


def prepare(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def classify(network: Classifier, images: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """[N, H, W, 3] uint8 -> class indices of the attributes [N, attributes]."""
    batches = np.array_split(images, max(1, len(images) // 64))
    classes = [torch.stack([logits.argmax(1) for logits in network(prepare(batch, device))], 1) for batch in batches]
    found: np.ndarray = torch.cat(classes).cpu().numpy()
    return found
