"""Stable Diffusion XL (Podell et al. 2023): two CLIP encoders and size conditioning for a UNet."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sglang_gen.engine.denoise import Predict
from sglang_gen.families import autoencoder as autoencoder
from sglang_gen.families import img2img, prediction, text_encoding, watermark
from sglang_gen.families.contract import ComponentConfig, Request
from sglang_gen.families.pipeline_contract import Pipeline, image_frames
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.families.unet_shared import UNetPipeline
from sglang_gen.models.vae import Autoencoder
from sglang_gen.models.vae import Config as AutoencoderConfig

POOLED = 512  # channels of the pooled embedding, transformers' default if the config has no projection_dim


class SDXLPipeline(UNetPipeline):
    """Stable Diffusion XL."""

    def encode(
        self, components: Mapping[str, Any], diffusers_config: ComponentConfig, texts: list[str], length: int | None
    ) -> tuple[Tensor, Tensor]:
        """Penultimate hidden states `[B, T, C]` of both encoders, joined; pooled output `[B, P]` of the second."""
        first, _ = text_encoding.clip(*text_encoding.encoder_inputs(components, "", texts))
        second, pooled = text_encoding.clip(*text_encoding.encoder_inputs(components, "_2", texts))
        return torch.cat([first, second], dim=-1), pooled

    def encoded_shapes(self, configs: Mapping[str, ComponentConfig], length: int | None) -> tuple[tuple[int, ...], ...]:
        """Shapes of the outputs of `encode` for one text, without the batch dimension, from the component configs."""
        pooled = configs["text_encoder_2"].get("projection_dim", POOLED)
        return self.text_shape(configs), (pooled,)

    def schedule(self, diffusers_config: ComponentConfig, scheduler: Any, request: Request) -> Tensor:
        """Set the timesteps and return those to run, `[S]`; begins at index 0 if the first timestep occurs twice."""
        timesteps = super().schedule(diffusers_config, scheduler, request)
        return timesteps if request.skipped is not None else img2img.remaining_timesteps(scheduler, 0)

    def prepare(
        self, networks: NetworkSchedule, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor, ...]]
    ) -> Predict:
        """The network as a predictor, with the conditioning of all steps computed once."""
        states, pooled = prediction.joined(encoded)
        size = (request.size.height, request.size.width)
        sizes = states.new_tensor([*size, 0, 0, *size])  # original size, top left corner of the crop, target size
        return prediction.predictor(networks, timesteps, states, pooled, sizes.expand(len(states), -1))

    def encoding_dtype(self, config: AutoencoderConfig, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an autoencoder loaded in `dtype` encodes: float32 if it overflows in float16."""
        return torch.float32 if config.upcast else dtype

    def encode_image(
        self, vae: Autoencoder, pixels: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype
    ) -> Tensor:
        """Latents `[B, C, h, w]` of the image `[1, 3, H, W]`, sampled once per generator."""
        with _in_float32(vae, self.encoding_dtype(vae.config, dtype) != dtype):
            latents = img2img.encode(vae, pixels.to(dtype), generators).to(
                dtype
            )  # rounds pixels first, as diffusers does
        if (moments := _moments(vae, latents)) is None:
            return vae.config.scaling.factor * latents
        mean, deviation = moments
        return (latents - mean) * vae.config.scaling.factor / deviation

    def decoding_dtype(self, config: AutoencoderConfig, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an autoencoder loaded in `dtype` decodes: float32 if it overflows in float16."""
        return torch.float32 if dtype == torch.float16 and config.upcast else dtype

    def decode(self, vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
        """Frames `[B, 1, H, W, 3]` in -1..1."""
        dtype = autoencoder.dtype(vae)
        with _in_float32(vae, self.decoding_dtype(vae.config, dtype) != dtype):
            images = vae.decode(_unscaled(vae, latents.to(autoencoder.dtype(vae))))
        return image_frames(watermark.watermarked(images, request.watermark))


@contextmanager
def _in_float32(vae: Autoencoder, wanted: bool) -> Iterator[None]:
    """Inside the context the autoencoder is in float32, if `wanted`."""
    dtype = autoencoder.dtype(vae)
    if wanted:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if wanted:
            vae.to(dtype)


def _unscaled(vae: Autoencoder, latents: Tensor) -> Tensor:
    if (moments := _moments(vae, latents)) is None:
        return latents / vae.config.scaling.factor
    mean, deviation = moments
    return latents * deviation / vae.config.scaling.factor + mean


def _moments(vae: Autoencoder, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of the latents' channels, `[1, C, 1, 1]` each, if the config has both."""
    scaling = vae.config.scaling
    if scaling.mean is None or scaling.deviation is None:
        return None
    mean, deviation = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (scaling.mean, scaling.deviation))
    return mean, deviation


PIPELINE: type[Pipeline] = SDXLPipeline
