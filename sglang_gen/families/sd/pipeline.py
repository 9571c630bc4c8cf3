"""Stable Diffusion 1 and 2: the last hidden state of one CLIP encoder conditions a UNet."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.denoise import Predict
from sglang_gen.families import img2img, prediction, text_encoding
from sglang_gen.families.contract import ComponentConfig, Request
from sglang_gen.families.pipeline_contract import Pipeline, image_frames
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.families.unet_shared import UNetPipeline
from sglang_gen.models.vae import Autoencoder


class SDPipeline(UNetPipeline):
    """Stable Diffusion 1 and 2."""

    def encode(
        self, components: Mapping[str, Any], diffusers_config: ComponentConfig, texts: list[str], length: int | None
    ) -> tuple[Tensor]:
        """CLIP hidden states `[B, T, C]`."""
        return (text_encoding.clip_last(*text_encoding.encoder_inputs(components, "", texts)),)

    def encoded_shapes(self, configs: Mapping[str, ComponentConfig], length: int | None) -> tuple[tuple[int, ...], ...]:
        """Shapes of the outputs of `encode` for one text, without the batch dimension, from the component configs."""
        return (self.text_shape(configs),)

    def prepare(
        self, networks: NetworkSchedule, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor, ...]]
    ) -> Predict:
        """The network as a predictor, with the conditioning of all steps computed once."""
        return prediction.predictor(networks, timesteps, *prediction.joined(encoded))

    def encode_image(
        self, vae: Autoencoder, pixels: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype
    ) -> Tensor:
        """Latents `[B, C, h, w]` of the image `[1, 3, H, W]`, sampled once per generator."""
        return vae.config.scaling.factor * img2img.encode(vae, pixels, generators)

    def decode(self, vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
        """Frames `[B, 1, H, W, 3]` in -1..1."""
        return image_frames(vae.decode(latents / vae.config.scaling.factor))


PIPELINE: type[Pipeline] = SDPipeline
