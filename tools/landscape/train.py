"""Trains the denoiser and its text encoders on encoded images.

    python -m tools.landscape.train --data work/data --vae work/vae --out work/model
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tools.landscape.train ...   one rank per core

Writes a diffusers folder with averaged weights in bfloat16, every `--save-every` steps and at the end, and beside it
the state of the training, so that `--resume` continues an interrupted run exactly.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.landscape.captions import caption
from tools.landscape.denoiser import Denoiser, flow_loss, hidden_matrices, optimizers
from tools.landscape.export import load_weights, save_pipeline
from tools.landscape.presets import PRESETS, Preset
from tools.landscape.ranks import average_gradients, broadcast_shards, join
from tools.landscape.scene import from_labels

EMPTY = 0.1  # fraction of empty captions, for classifier-free guidance
LONG = 1 / 24  # fraction of batches with the T5 length that diffusers uses by default
AVERAGE = 0.995  # decay of the averaged weights


def batches(model: Denoiser, data: Path, size: int, seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (latents [B, C, h, w], CLIP ids [B, 32], T5 ids [B, 32 or 256]); the T5 length is the same on all ranks."""
    rng, length_rng = np.random.default_rng([seed, rank]), np.random.default_rng(seed)
    latents = np.load(data / "latents.npy", mmap_mode="r")
    labels = np.load(data / "latent_labels.npy")
    while True:
        chosen = rng.integers(len(latents), size=size)
        texts = [caption(from_labels(labels[i].tolist()), rng).text for i in chosen]
        texts = ["" if rng.uniform() < EMPTY else text for text in texts]
        clip_ids, t5_ids = model.text.tokens(texts, 256 if length_rng.uniform() < LONG else 32)
        yield torch.from_numpy(latents[chosen]).float(), clip_ids, t5_ids


def rate_factor(step: int, steps: int) -> float:
    """Warm up over 3 % of the steps, stay constant until 40 %, then decay linearly to zero."""
    done = step / steps
    return min(1.0, done / 0.03, (1 - done) / 0.6)


@torch.no_grad()
def average_into(averaged: Denoiser, model: Denoiser, step: int) -> None:
    decay = min(AVERAGE, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def update(loss: Tensor, model: Denoiser, optims: list[torch.optim.Optimizer], factor: float) -> None:
    loss.backward()
    average_gradients(model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optims:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak", group["lr"])
        optimizer.step()
    model.zero_grad()


def state_file(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}_state") / f"rank_{rank}.pt"


def save_state(
    out: Path, rank: int, step: int, model: Denoiser, averaged: Denoiser, optims: list[torch.optim.Optimizer]
) -> None:
    """Save everything that the next step depends on; each rank has its own optimizer state and random state."""
    path = state_file(out, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optims": [optimizer.state_dict() for optimizer in optims],
        "random": torch.get_rng_state(),
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(out: Path, rank: int, model: Denoiser, averaged: Denoiser, optims: list[torch.optim.Optimizer]) -> int:
    """Load what `save_state` saved; returns the number of completed steps."""
    state = torch.load(state_file(out, rank), map_location=model.transformer.device)
    model.load_state_dict(state["model"])
    averaged.load_state_dict(state["averaged"])
    for optimizer, kept in zip(optims, state["optims"], strict=True):
        optimizer.load_state_dict(kept)
    torch.set_rng_state(state["random"].cpu())
    return int(state["step"])


def train(model: Denoiser, args: argparse.Namespace, preset: Preset, steps: int) -> None:
    """Train, and save the exponential moving average of the weights."""
    rank, ranks = join()
    torch.manual_seed(args.seed + rank)
    spec, started, losses = preset.denoiser, time.time(), []
    averaged = copy.deepcopy(model)
    hidden, other = hidden_matrices(model)
    shards = [hidden[r::ranks] for r in range(ranks)]  # Muon takes a third of a step, so it is divided among the ranks
    optims = optimizers(shards[rank], other, spec.rate, spec.muon_rate)
    source = batches(model, args.data, spec.batch // ranks, args.seed, rank)
    for block in model.transformer.transformer_blocks:
        block.compile(dynamic=False)
    done = load_state(args.out, rank, model, averaged, optims) if args.resume else 0
    source = islice(source, done, None)
    for step in range(done + 1, steps + 1):
        loss = flow_loss(model, *(tensor.to(args.device) for tensor in next(source)), spec.shift)
        update(loss, model, optims, rate_factor(step, steps))
        broadcast_shards(shards)
        average_into(averaged, model, step)
        losses.append(loss.item())
        if step % 50 == 0 and rank == 0:
            print(f"step {step} loss {np.mean(losses[-50:]):.4f} {time.time() - started:.0f} s", flush=True)
        if step % args.save_every == 0:
            save_state(args.out, rank, step, model, averaged, optims)
            if rank == 0:
                save_pipeline(averaged, args.vae, spec.shift, args.out)
    if rank == 0:
        save_pipeline(averaged, args.vae, spec.shift, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--continue-from", type=Path, help="continue from this model")
    parser.add_argument("--resume", action="store_true", help="resume the interrupted run that writes to --out")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    torch.manual_seed(args.seed)
    latent_size = np.load(args.data / "latents.npy", mmap_mode="r").shape[-1]
    model = Denoiser(preset, latent_size).to(args.device)
    if args.continue_from:
        load_weights(model, args.continue_from)
    # plain matmuls are faster than the fused kernel for 128 tokens on a CPU
    with sdpa_kernel(SDPBackend.MATH) if args.device.type == "cpu" else nullcontext():
        train(model, args, preset, args.steps or preset.denoiser.steps)


if __name__ == "__main__":
    main()
