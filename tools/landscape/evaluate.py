"""Evaluates how well generated images follow their prompts, and how well the autoencoder reconstructs.

    python -m tools.landscape.evaluate --model sglang_gen/assets/landscape --out work/evaluation

The classifier in the model's folder judges the images (tools.landscape.classifier trains it). Writes evaluation.json,
evaluation.md (a table) and grid.png (eight prompts).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from sglang_gen.perf.attributes import CLASSIFIER_FILE, Attributes, load
from tools.landscape.captions import full_caption
from tools.landscape.classifier import accuracy
from tools.landscape.data import HELD_OUT_SEED, draw, tile
from tools.landscape.scene import ATTRIBUTES, sample_scene
from tools.landscape.train_autoencoder import psnr

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


def trusted(folder: Path) -> dict[str, float]:
    """The accuracy of the classifier in a model's folder on held-out renders."""
    with safe_open(folder / CLASSIFIER_FILE, framework="pt") as file:
        return json.loads(file.metadata()["held_out_accuracy"])


def adherence(pipeline: DiffusionPipeline, judge: Attributes, args: argparse.Namespace) -> dict[str, float]:
    """Fraction of generated images that show each attribute of their prompt: "prompts followed" in the table."""
    rng = np.random.default_rng(args.seed)
    scenes = [sample_scene(rng) for _ in range(args.count)]
    images = generate(pipeline, [full_caption(scene, rng) for scene in scenes], args)
    tile(images[: len(images) // 8 * 8], columns=8).save(args.out / "judged.png")
    return accuracy(judge.classes(images), np.array([scene.labels() for scene in scenes]))


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
    judge = load(args.model)
    size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    images = np.stack([draw(HELD_OUT_SEED, index, size)[1] for index in range(256)])
    return {
        "settings": {"steps": args.steps, "guidance": args.guidance, "text_length": args.text_length},
        "dtype": str(args.dtype), "seed": args.seed, "images": args.count, "resolution": size,
        "adherence": adherence(pipeline, judge, args),
        "classifier": trusted(args.model),
        "autoencoder_psnr_db": psnr(pipeline.vae, images, args.device),
        "load_seconds": loaded,
        "seconds_per_image": seconds_per_image(pipeline, args),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--text-length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
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
