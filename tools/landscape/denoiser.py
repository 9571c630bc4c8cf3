"""The trained network (SD3Transformer2DModel with its text encoders), its loss and its optimizers."""

import math

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from tools.landscape.presets import Preset
from tools.landscape.text import TextEncoders

ADAM_ONLY = ("norm", "embed", "proj_out", "text.", "context_embedder")  # parameters that are not hidden matrices


class Denoiser(nn.Module):
    def __init__(self, preset: Preset, latent_size: int) -> None:
        super().__init__()
        spec = preset.denoiser
        self.text = TextEncoders(spec)
        self.transformer = SD3Transformer2DModel(
            sample_size=latent_size,
            patch_size=spec.patch,
            in_channels=preset.autoencoder.latent_channels,
            out_channels=preset.autoencoder.latent_channels,
            num_layers=spec.layers,
            attention_head_dim=spec.head_dim,
            num_attention_heads=spec.heads,
            joint_attention_dim=2 * spec.text_width,
            caption_projection_dim=spec.heads * spec.head_dim,
            pooled_projection_dim=2 * spec.text_width,
            pos_embed_max_size=3 * latent_size // spec.patch,
            qk_norm="rms_norm",
        )
        for block in self.transformer.transformer_blocks:  # every block is the identity at initialization
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def forward(self, noisy: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity (noise - latents) [B, C, h, w] of latents at noise level `sigma` [B] in [0, 1]."""
        sequence, pooled = self.text(clip_ids, t5_ids)
        return self.transformer(noisy, sequence, pooled, 1000 * sigma, return_dict=False)[0]


def flow_loss(model: Denoiser, latents: Tensor, clip_ids: Tensor, t5_ids: Tensor, shift: float) -> Tensor:
    """Flow matching loss with logit-normal noise levels (Esser et al. 2024, section 3.1).

    `shift` moves the noise levels towards noise (equation 23), where the layout of an image is decided.
    """
    noise = torch.randn_like(latents)
    sigma = torch.sigmoid(torch.randn(len(latents), device=latents.device) + math.log(shift))
    s = sigma[:, None, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = model((1 - s) * latents + s * noise, sigma, clip_ids, t5_ids)
    return (velocity.float() - (noise - latents)).square().mean()


def hidden_matrices(model: Denoiser) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, for Muon, and all other parameters, for AdamW."""
    hidden, other = [], []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and not any(part in name for part in ADAM_ONLY)
        (hidden if is_hidden else other).append(parameter)
    return hidden, other


def optimizers(
    shard: list[nn.Parameter], other: list[nn.Parameter], rate: float, muon_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for this rank's shard of the hidden matrices, AdamW for all other parameters."""
    return [
        torch.optim.Muon(shard, muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
