"""Encodes a data set once: the latents of each image and of its mirror image.

python -m tools.landscape.latents --data work/data --vae work/vae
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tools.landscape.scene import flip, from_labels
from tools.landscape.train_autoencoder import to_model

BATCH = 32


def mirrored(labels: np.ndarray) -> np.ndarray:
    """[N, 5] labels of the mirrored images."""
    return np.array([flip(from_labels(row.tolist())).labels() for row in labels], np.uint8)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> np.ndarray:
    """[B, size, size, 3] uint8 -> standardized latents [B, C, h, w] float16."""
    with torch.autocast(device.type, torch.bfloat16):
        mean = vae.encode(to_model(images, device)).latent_dist.mode()
    return ((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu().numpy()


def write_latents(vae: AutoencoderKL, data: Path, device: torch.device) -> None:
    """Write latents.npy [2 N, C, h, w] float16 and latent_labels.npy [2 N, 5]: all images, then the mirrored ones."""
    images = np.load(data / "pictures.npy", mmap_mode="r")
    labels = np.load(data / "labels.npy")
    count, size = len(images), images.shape[1]
    side = size >> (len(vae.config.block_out_channels) - 1)
    shape = (2 * count, vae.config.latent_channels, side, side)
    latents = np.lib.format.open_memmap(data / "latents.npy", mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, count, BATCH):
        batch = np.asarray(images[start : start + BATCH])
        latents[start : start + len(batch)] = encode(vae, batch, device)
        latents[count + start : count + start + len(batch)] = encode(vae, batch[:, :, ::-1].copy(), device)
        if start % (16 * BATCH) == 0:
            print(f"{start}/{count}", flush=True)
    np.save(data / "latent_labels.npy", np.concatenate([labels, mirrored(labels)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.vae).to(args.device).eval()
    write_latents(vae, args.data, args.device)


if __name__ == "__main__":
    main()
