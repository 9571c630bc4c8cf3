"""DeepCache by hand around diffusers' UNet, and with the helper of the DeepCache package."""

from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor


class ByHand:
    """The forward of a UNet, which from the second evaluation on takes the kept feature map unless it is in `full`."""

    def __init__(self, unet: UNet2DConditionModel, branch: int, full: Collection[int]) -> None:
        self.unet, self.branch, self.full = unet, branch, full
        self.count, self.deep = 0, torch.empty(0)

    def __call__(self, sample: Tensor, t: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs=None, **_):
        unet, text, whole = self.unet, encoder_hidden_states, self.count in self.full
        self.count += 1
        embedded = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
        added = unet.get_aug_embed(emb=embedded, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
        self.embedded, self.text = embedded if added is None else embedded + added, text
        skips = [unet.conv_in(sample)]
        for block in unet.down_blocks:
            for residual, attention in pairs(block):
                skips.append(self.run(residual, attention, skips[-1]))
            skips += [sampler(skips[-1]) for sampler in block.downsamplers or []]
        x = unet.mid_block(skips[-1], self.embedded, encoder_hidden_states=text)
        for block in unet.up_blocks:
            for residual, attention in pairs(block):
                if len(skips) == self.branch + 1:
                    self.deep = x = x if whole else self.deep
                x = self.run(residual, attention, torch.cat([x, skips.pop()], dim=1))
            for sampler in block.upsamplers or []:
                x = sampler(x)
        return (unet.conv_out(unet.conv_act(unet.conv_norm_out(x))),)

    def run(self, residual, attention, x: Tensor) -> Tensor:
        x = residual(x, self.embedded)
        return x if attention is None else attention(x, encoder_hidden_states=self.text, return_dict=False)[0]


def pairs(block):
    return zip_longest(block.resnets, getattr(block, "attentions", ()))


def _latents(pipeline, steps: int, guidance: float) -> np.ndarray:
    return pipeline("a cat", guidance_scale=guidance, num_inference_steps=steps, height=32, width=48,
                    generator=torch.Generator("cpu").manual_seed(7), output_type="latent").images.numpy()  # fmt: skip


def _pipeline(folder: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_hand(folder: Path, branch: int, full: Collection[int], steps: int, guidance: float = 3.0) -> np.ndarray:
    """Latents of diffusers' pipeline, whose UNet computes all of its stages in these evaluations only."""
    pipeline = _pipeline(folder)
    pipeline.unet.forward = ByHand(pipeline.unet, branch, full)
    return _latents(pipeline, steps, guidance)


def by_helper(helper: type, folder: Path, branch: int, interval: int, steps: int) -> np.ndarray:
    """Latents of diffusers' pipeline with the helper enabled, which counts three skip connections for each level."""
    pipeline = _pipeline(folder)
    level, layer = divmod(branch, pipeline.unet.config.layers_per_block + 1)
    enabled = helper(pipe=pipeline)
    enabled.set_params(cache_interval=interval, cache_branch_id=3 * level + layer)
    enabled.enable()
    return _latents(pipeline, steps, 3.0)
