"""Trains the autoencoder on rendered images.

    python -m tools.landscape.train_autoencoder --data work/data --out work/vae

The loss is L1 on pixels and on their horizontal and vertical differences (which emphasizes low-contrast edges), some
mean squared error, and a small KL term that keeps the latents close to a unit Gaussian.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tools.landscape.data import HELD_OUT_SEED, draw
from tools.landscape.presets import PRESETS, Preset

CROPPED = 0.85  # fraction of the steps on a quarter of each image, which are four times as fast


def build_autoencoder(preset: Preset) -> AutoencoderKL:
    spec = preset.autoencoder
    levels = len(spec.widths)
    vae = AutoencoderKL(
        block_out_channels=spec.widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=spec.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=preset.size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    vae.encoder.conv_out.bias.data[spec.latent_channels :] = -5.0  # initial log variance: little noise
    return vae


def to_model(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def crop(images: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square crop at the same position in all images."""
    top, left = rng.integers(0, images.shape[1] - size + 1, 2)
    return images[:, top : top + size, left : left + size].copy()


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    error = output.float() - target
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    return error.abs().mean() + across.abs().mean() + down.abs().mean() + 2 * error.square().mean()


def autoencoder_loss(vae: AutoencoderKL, images: torch.Tensor, divergence: float) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return reconstruction_loss(output, images) + divergence * kl


def held_out(preset: Preset, count: int) -> np.ndarray:
    """Images [count, size, size, 3] uint8 of a seed that is not used for training."""
    return np.stack([draw(HELD_OUT_SEED, index, preset.size)[1] for index in range(count)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """Mean over images of the peak signal-to-noise ratio of the reconstruction, in dB."""
    values = []
    for batch in np.array_split(images, max(1, len(images) // 16)):
        target = to_model(batch, device).to(vae.dtype)
        output = vae.decode(vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((output.float() - target.float()) / 2).square().mean((1, 2, 3))
        values += (-10 * error.log10()).tolist()
    return float(np.mean(values))


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> None:
    """Set shift_factor and scaling_factor so that (latents - shift) * scale has mean 0 and deviation 1."""
    batches = np.array_split(images, max(1, len(images) // 16))
    latents = torch.cat([vae.encode(to_model(b, device).to(vae.dtype)).latent_dist.mode() for b in batches])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


class ConvMuon:
    """Muon for convolution kernels, viewed as matrices [out, in * 3 * 3]; Adam for all other parameters."""

    def __init__(self, vae: AutoencoderKL, rate: float) -> None:
        kernels = [p for name, p in vae.named_parameters() if p.ndim == 4 and "conv_in" not in name]
        self.kernels = [kernel for kernel in kernels if kernel is not vae.decoder.conv_out.weight]
        self.matrices = [torch.nn.Parameter(kernel.data.view(len(kernel), -1)) for kernel in self.kernels]
        chosen = {id(kernel) for kernel in self.kernels}
        other = [p for p in vae.parameters() if id(p) not in chosen]
        self.muon = torch.optim.Muon(self.matrices, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.Adam(other, rate, betas=(0.9, 0.99))

    def step(self, rate: float) -> None:
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad, kernel.grad = kernel.grad.view(len(kernel), -1), None
        for optimizer in (self.muon, self.adam):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()


def train(vae: AutoencoderKL, data: Path, preset: Preset, steps: int, device: torch.device, seed: int) -> None:
    spec = preset.autoencoder
    images = np.load(data / "pictures.npy", mmap_mode="r")
    optimizer = ConvMuon(vae, spec.rate)
    rng, test, started, losses = np.random.default_rng(seed), held_out(preset, 32), time.time(), []
    for step in range(1, steps + 1):
        chosen = images[np.sort(rng.choice(len(images), spec.batch, replace=False))]
        batch = to_model(crop(chosen, preset.size // 2, rng) if step < CROPPED * steps else chosen, device)
        loss = autoencoder_loss(vae, batch, spec.divergence)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(spec.rate * min(1.0, step / 100, (steps - step + 1) / (0.6 * steps)))
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} loss {np.mean(losses[-100:]):.4f} {time.time() - started:.0f} s", flush=True)
        if step % 500 == 0:
            print(f"step {step} held-out PSNR {psnr(vae, test, device):.2f} dB", flush=True)
            vae.save_pretrained(data / "vae_unfinished")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--start", type=Path, help="continue from this autoencoder")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.start) if args.start else build_autoencoder(preset)
    vae.to(args.device)
    train(vae, args.data, preset, args.steps or preset.autoencoder.steps, args.device, args.seed)
    standardise(vae, held_out(preset, 512), args.device)
    print(f"held-out PSNR {psnr(vae, held_out(preset, 256), args.device):.2f} dB", flush=True)
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
