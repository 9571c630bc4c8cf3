"""Draws the training images and labels in parallel and saves them; the same seed gives the same images.

python -m tools.landscape.data --grid grid.png   draw a few images to look at
python -m tools.landscape.data --out work/data   draw the preset's data set
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tools.landscape.presets import PRESETS
from tools.landscape.render import render
from tools.landscape.scene import ATTRIBUTES, Scene, sample_scene

CHUNK = 250
HELD_OUT_SEED = 1_000_003  # of renders that nothing is trained on


def draw(seed: int, index: int, size: int) -> tuple[Scene, np.ndarray]:
    """Scene and image ([size, size, 3], uint8) number `index` of the data set with this seed."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    return scene, render(scene, rng, size)


def draw_chunk(start: int, seed: int, count: int, size: int, folder: Path) -> None:
    images = np.load(folder / "pictures.npy", mmap_mode="r+")
    labels = np.load(folder / "labels.npy", mmap_mode="r+")
    for index in range(start, min(start + CHUNK, count)):
        scene, images[index] = draw(seed, index, size)
        labels[index] = scene.labels()


def write_dataset(folder: Path, seed: int, count: int, size: int, workers: int) -> None:
    """Write pictures.npy [count, size, size, 3] uint8 and labels.npy [count, 5] uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"pictures": (count, size, size, 3), "labels": (count, len(ATTRIBUTES))}
    for name, shape in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    job = partial(draw_chunk, seed=seed, count=count, size=size, folder=folder)
    with ProcessPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(job, range(0, count, CHUNK)), 1):
            print(f"{min(done * CHUNK, count)}/{count}", flush=True)


def tile(images: np.ndarray, columns: int) -> Image.Image:
    """Arrange images [N, H, W, 3] uint8 in a grid; N must be a multiple of `columns`."""
    n, h, w, c = images.shape
    grid = images.reshape(n // columns, columns, h, w, c).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(n // columns * h, columns * w, c))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, help="write 48 images as one PNG")
    parser.add_argument("--out", type=Path, help="folder of the data set")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--count", type=int, help="default: the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if args.grid:
        tile(np.stack([draw(args.seed, i, preset.size)[1] for i in range(48)]), columns=8).save(args.grid)
    if args.out:
        write_dataset(args.out, args.seed, args.count or preset.images, preset.size, args.workers)


if __name__ == "__main__":
    main()
