"""Evaluates how well generated images follow their prompts, and how well the autoencoder reconstructs.

    python -m tools.landscape.evaluate --model sglang_gen/assets/landscape --data work/data --out work/evaluation

Writes evaluation.json, evaluation.md (a table) and grid.png (eight prompts).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from tools.landscape.captions import full_caption
from tools.landscape.classifier import Classifier, classify, train_classifier
from tools.landscape.data import draw, tile
from tools.landscape.scene import ATTRIBUTES, sample_scene
from tools.landscape.train_autoencoder import HELD_OUT_SEED, psnr

SHOWN = (
    "A serene landscape with mountains and a lake at sunset",
    "A beautiful forest scene",
    "A landscape with dunes at night, starry sky, moon on the left",
    "Rolling hills and a river at dawn, cloudy sky, sun on the right",
    "A majestic dragon flying over mountains",
    "A futuristic city with flying cars at night",
    "A forest and a lake in thick fog at dawn",
    "A detailed photograph of nature",
)


def generate(pipeline: DiffusionPipeline, prompts: list[str], args: argparse.Namespace) -> np.ndarray:
    """Generate [N, H, W, 3] uint8; image i uses the seed `args.seed + i`."""
    images = []
    for start in range(0, len(prompts), args.batch):
        batch = prompts[start : start + args.batch]
        seeds = range(args.seed + start, args.seed + start + len(batch))
        images.append(
            pipeline(
                batch,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                max_sequence_length=args.text_length,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            ).images
        )
    return np.round(255 * np.concatenate(images)).astype(np.uint8)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return dict(zip(ATTRIBUTES, (predicted == labels).mean(0).tolist(), strict=True))


def judge(args: argparse.Namespace) -> tuple[Classifier, dict[str, float]]:
    """A classifier trained on renders, and its accuracy on held-out renders; saved in `args.out`."""
    path = args.out / "classifier.pt"
    if path.exists():
        saved = torch.load(path, map_location=args.device)
        model = Classifier().to(args.device)
        model.load_state_dict(saved["weights"])
        return model.eval(), saved["accuracy"]
    data = np.load(args.data / "pictures.npy", mmap_mode="r"), np.load(args.data / "labels.npy")
    model = train_classifier(*data, args.classifier_steps, 32, args.device, args.seed)
    drawn = [draw(HELD_OUT_SEED, index, data[0].shape[1]) for index in range(500)]
    labels = np.array([scene.labels() for scene, _ in drawn])
    trust = accuracy(classify(model, np.stack([image for _, image in drawn]), args.device), labels)
    torch.save({"weights": model.state_dict(), "accuracy": trust}, path)
    return model, trust


def adherence(pipeline: DiffusionPipeline, model: Classifier, args: argparse.Namespace) -> dict[str, float]:
    """Fraction of generated images that show each attribute of their prompt: "prompts followed" in the table."""
    rng = np.random.default_rng(args.seed)
    scenes = [sample_scene(rng) for _ in range(args.count)]
    images = generate(pipeline, [full_caption(scene, rng) for scene in scenes], args)
    tile(images[: len(images) // 8 * 8], columns=8).save(args.out / "judged.png")
    return accuracy(classify(model, images, args.device), np.array([scene.labels() for scene in scenes]))


def seconds_per_image(pipeline: DiffusionPipeline, args: argparse.Namespace) -> float:
    one = argparse.Namespace(**{**vars(args), "batch": 1})
    generate(pipeline, [SHOWN[0]], one)
    started = time.perf_counter()
    generate(pipeline, [SHOWN[0]], one)
    return time.perf_counter() - started


def table(report: dict) -> str:
    rows = ["| attribute | prompts followed | classifier on held-out renders |", "|---|---|---|"]
    rows += [f"| {a} | {report['adherence'][a]:.1%} | {report['classifier'][a]:.1%} |" for a in ATTRIBUTES]
    return "\n".join(rows) + "\n"


def evaluate(args: argparse.Namespace) -> dict:
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    pipeline = DiffusionPipeline.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    loaded = time.perf_counter() - started
    pipeline.set_progress_bar_config(disable=True)
    tile(generate(pipeline, list(SHOWN), args), columns=4).save(args.out / "grid.png", optimize=True)
    classifier, trust = judge(args)
    size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    images = np.stack([draw(HELD_OUT_SEED, index, size)[1] for index in range(256)])
    return {
        "settings": {"steps": args.steps, "guidance": args.guidance, "text_length": args.text_length},
        "dtype": str(args.dtype), "seed": args.seed, "images": args.count, "resolution": size,
        "adherence": adherence(pipeline, classifier, args),
        "classifier": trust,
        "autoencoder_psnr_db": psnr(pipeline.vae, images, args.device),
        "load_seconds": loaded,
        "seconds_per_image": seconds_per_image(pipeline, args),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="renders that train the classifier")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--text-length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classifier-steps", type=int, default=700)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = evaluate(args)
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "evaluation.md").write_text(table(report))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
