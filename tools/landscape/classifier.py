"""Trains the classifier of the five attributes on renders, and writes it into a model's folder.

    python -m tools.landscape.data --out work/renders --count 6000 --seed 2
    python -m tools.landscape.classifier --data work/renders --out sglang_gen/assets/landscape

Writes attributes.json, the phrases of the captions that name each value, and attributes.safetensors, the weights in
float16. Its metadata has the attributes, the accuracy on renders that were not trained on, the seed and the command.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from sglang_gen.perf.attribute_classifier import Classifier, classify, prepare
from sglang_gen.perf.attributes import CLASSIFIER_FILE, VOCABULARY_FILE
from tools.landscape.data import HELD_OUT_SEED, draw
from tools.landscape.scene import ATTRIBUTES
from tools.landscape.words import PHRASES

HELD_OUT = 500  # renders
RATE = 2e-3


def vocabulary(size: int, width: int) -> dict:
    """The content of attributes.json. The captions' phrases lose their article, so that "lake" names one too."""

    def phrases(options: tuple[str, ...]) -> list[str]:
        discs = [option.format(disc=disc) for option in options for disc in ("sun", "moon")]
        return sorted({phrase.removeprefix("a ").removeprefix("an ").removeprefix("the ") for phrase in discs})

    named = {name: {value: phrases(PHRASES[name][value]) for value in values} for name, values in ATTRIBUTES.items()}
    return {"size": size, "width": width, "attributes": named}


def disturbed(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Slight noise and, in half of the steps, blur: generated images have less texture than renders."""
    if rng.uniform() < 0.5:
        small = avg_pool2d(images, 2)
        images = images.lerp(interpolate(small, scale_factor=2, mode="bilinear"), float(rng.uniform()))
    return images + rng.uniform(0, 0.1) * torch.randn_like(images)


def train(data: Path, steps: int, batch: int, width: int, seed: int, device: torch.device) -> Classifier:
    """Train with cross entropy on all attributes."""
    images, labels = np.load(data / "pictures.npy", mmap_mode="r"), np.load(data / "labels.npy")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = Classifier([len(values) for values in ATTRIBUTES.values()], width).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = np.sort(rng.choice(len(images), batch, replace=False))
        inputs = disturbed(prepare(images[chosen], device), rng)
        target = torch.from_numpy(labels[chosen].astype(np.int64)).to(device)
        loss = sum(cross_entropy(logits, target[:, i]) for i, logits in enumerate(network(inputs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier step {step} loss {loss.item():.4f}", flush=True)
    return network.eval()


def held_out(find: Callable[[np.ndarray], np.ndarray], size: int, count: int = HELD_OUT) -> dict[str, float]:
    """The accuracy of each attribute on renders that were not trained on."""
    drawn = [draw(HELD_OUT_SEED, index, size) for index in range(count)]
    labels = np.array([scene.labels() for scene, _ in drawn])
    return accuracy(find(np.stack([image for _, image in drawn])), labels)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return dict(zip(ATTRIBUTES, (predicted == labels).mean(0).tolist(), strict=True))


def rounded(network: Classifier) -> dict[str, Tensor]:
    """The weights in float16; the counters of batch norm stay integers."""
    state = network.cpu().state_dict()
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def write(network: Classifier, folder: Path, words: dict, facts: dict[str, str]) -> dict[str, float]:
    """Write both files. Returns the accuracy of the rounded weights on held-out renders."""
    weights = rounded(network)
    network.load_state_dict(weights)
    found = held_out(lambda images: classify(network, images), words["size"])
    described = {name: list(values) for name, values in ATTRIBUTES.items()}
    metadata = {"attributes": json.dumps(described), "held_out_accuracy": json.dumps(found),
                "held_out_renders": str(HELD_OUT), **facts}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / CLASSIFIER_FILE, metadata)
    (folder / CLASSIFIER_FILE).chmod(0o644)  # safetensors writes for the owner alone
    (folder / VOCABULARY_FILE).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="renders to train on")
    parser.add_argument("--out", type=Path, required=True, help="a model's folder")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    network = train(args.data, args.steps, args.batch, args.width, args.seed, args.device)
    size = np.load(args.data / "pictures.npy", mmap_mode="r").shape[1]
    settings = " ".join(f"--{name} {getattr(args, name)}" for name in ("steps", "batch", "width", "seed"))
    facts = {"seed": str(args.seed), "command": f"python -m tools.landscape.classifier {settings}"}
    print(json.dumps(write(network, args.out, vocabulary(size, args.width), facts), indent=2))


if __name__ == "__main__":
    main()
