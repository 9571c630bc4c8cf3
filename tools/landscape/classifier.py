"""A small classifier of the five attributes, trained on renders; it evaluates generated images."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tools.landscape.scene import ATTRIBUTES


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> one tensor of logits per attribute. Feature maps stay spatial until the last layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            stage(3, w),
            stage(w, 2 * w),
            stage(2 * w, 3 * w),
            stage(3 * w, 4 * w),
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
        )
        self.heads = nn.ModuleList(nn.Linear(4 * w * 64, len(values)) for values in ATTRIBUTES.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        return [head(features) for head in self.heads]


def prepare(images: np.ndarray, device: torch.device) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(
    images: np.ndarray, labels: np.ndarray, steps: int, batch: int, device: torch.device, seed: int
) -> Classifier:
    """Train with cross entropy on all attributes; slight noise makes the classifier rely on content, not texture."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = np.sort(rng.choice(len(images), batch, replace=False))
        inputs = prepare(images[chosen], device)
        inputs = inputs + rng.uniform(0, 0.1) * torch.randn_like(inputs)
        target = torch.from_numpy(labels[chosen].astype(np.int64)).to(device)
        loss = sum(cross_entropy(logits, target[:, i]) for i, logits in enumerate(model(inputs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier step {step} loss {loss.item():.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def classify(model: Classifier, images: np.ndarray, device: torch.device) -> np.ndarray:
    """[N, H, W, 3] uint8 -> class indices of the attributes [N, 5]."""
    batches = np.array_split(images, max(1, len(images) // 64))
    classes = [torch.stack([logits.argmax(1) for logits in model(prepare(b, device))], 1) for b in batches]
    return torch.cat(classes).cpu().numpy()
