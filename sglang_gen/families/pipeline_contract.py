"""The contract of a family's pipeline: what the native engine calls, from texts to images, and what it reads."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sglang_gen.engine.denoise import Predict, draw_noise
from sglang_gen.engine.sparse_attention import Grid
from sglang_gen.families.contract import ComponentConfig, Request, Spec
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.models.vae import Autoencoder
from sglang_gen.models.vae import Config as AutoencoderConfig
from sglang_gen.parallel.sequence_boundary import Sharding
from sglang_gen.parallel.tensor import Table


class Pipeline(ABC):
    """Computation of one family. B samples, S timesteps; latents are `[B, C, h, w]` unless a family packs them.

    `diffusers_config` is the config.json of a denoising network, of the first one where nothing else is said; all
    networks of a family have one class, table of layers, sharding and names of tensors. `components` are the loaded
    components by name.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    # The network

    @property
    @abstractmethod
    def tensor_parallel(self) -> Table:
        """The layers that tensor parallelism shards, by patterns of module names."""

    @property
    @abstractmethod
    def sharding(self) -> Sharding:
        """How sequence parallelism shards latents, conditioning and attention."""

    @property
    @abstractmethod
    def regions(self) -> tuple[type[nn.Module], ...]:
        """Classes of blocks whose forward is compiled once for all of their modules."""

    @abstractmethod
    def build(self, diffusers_config: ComponentConfig) -> nn.Module:
        """The denoising network with random weights, on the default device; `network.config` is its own Config."""

    @abstractmethod
    def sources(self, name: str) -> Mapping[str, str]:
        """Checkpoint names of the network's tensor `name`, each with its section of the layer ("": the whole)."""

    # Text

    @abstractmethod
    def encode(
        self, components: Mapping[str, Any], diffusers_config: ComponentConfig, texts: list[str], length: int | None
    ) -> tuple[Tensor, ...]:
        """Encoded texts, `[B, ...]` each; `length` tokens if the family takes a length (None: its default).

        A family that pads texts to the longest of a batch returns, behind each text `[B, T, ...]`, its boolean mask
        `[B, T]` (True: a token, False: padding). `Spec.text_masks` says which outputs these are.
        """

    @abstractmethod
    def encoded_shapes(self, configs: Mapping[str, ComponentConfig], length: int | None) -> tuple[tuple[int, ...], ...]:
        """Shapes of the outputs of `encode` for one text, without the batch dimension, from all components' configs.

        Of texts whose length is not known before they are encoded: the longest possible.
        """

    def empty_texts(
        self, configs: Mapping[str, ComponentConfig], length: int | None, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """What `encode` returns for `rows` texts, as empty tensors on the meta device."""
        masks = self.spec.text_masks
        return tuple(
            torch.empty(rows, *shape, dtype=torch.bool if index in masks else dtype, device="meta")
            for index, shape in enumerate(self.encoded_shapes(configs, length))
        )

    # Schedule and latents

    @abstractmethod
    def schedule(self, diffusers_config: ComponentConfig, scheduler: Any, request: Request) -> Tensor:
        """Set the scheduler's timesteps and return those to run, `[S]`.

        Raises UserError if the scheduler cannot sample this family or refuses the number of steps.
        """

    @abstractmethod
    def skipped(self, steps: int, strength: float) -> int:
        """Steps that image-to-image skips at a noise `strength` in 0..1."""

    @abstractmethod
    def latents_shape(self, diffusers_config: ComponentConfig, request: Request) -> tuple[int, ...]:
        """Shape of one sample's latents as the network sees them, without the batch dimension."""

    def draw(
        self,
        diffusers_config: ComponentConfig,
        request: Request,
        generators: Sequence[torch.Generator],
        dtype: torch.dtype,
    ) -> Tensor:
        """Noise on the CPU, one row per generator; `start` packs it if the family packs latents."""
        return draw_noise(self.latents_shape(diffusers_config, request), generators, dtype)

    @abstractmethod
    def encode_image(
        self, vae: Autoencoder, pixels: Tensor, generators: Sequence[torch.Generator], dtype: torch.dtype
    ) -> Tensor:
        """Scaled latents `[B, C, h, w]` of the image `[1, 3, H, W]` in -1..1, sampled once per generator."""

    @abstractmethod
    def start(self, scheduler: Any, timesteps: Tensor, noise: Tensor, source: Tensor | None) -> Tensor:
        """Latents before the first step: from noise, or from the input image's latents `source` with noise added.

        Raises UserError if the scheduler cannot add noise to an image.
        """

    # Denoising

    def network_names(self, timesteps: Tensor, request: Request) -> tuple[str, ...]:
        """Name of the network that computes each of the timesteps `[S]`: the first, unless a family has several."""
        return (self.spec.network,) * len(timesteps)

    @abstractmethod
    def prepare(
        self, networks: NetworkSchedule, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor, ...]]
    ) -> Predict:
        """The networks as a function of latents and step, with the conditioning of all steps computed once.

        `networks` are the family's networks, or what has their interface; `encoded` holds one output of `encode` for
        each guidance branch that is evaluated in one batch.
        """

    @abstractmethod
    def grids(self, config: Any, request: Request, encoded: Sequence[tuple[Tensor, ...]]) -> list[Grid]:
        """Where the image tokens stand in each attention sequence; `config` is the network's own Config."""

    @abstractmethod
    def widest_map(self, diffusers_config: ComponentConfig, request: Request) -> int:
        """Elements of the largest activation of one sample."""

    # The autoencoder

    def encoding_dtype(self, config: AutoencoderConfig, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an autoencoder loaded in `dtype` encodes an image."""
        return dtype

    def decoding_dtype(self, config: AutoencoderConfig, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which an autoencoder loaded in `dtype` decodes latents."""
        return dtype

    def autoencoder_shape(self, config: AutoencoderConfig, request: Request, rows: int) -> tuple[int, ...]:
        """Shape of the latents that the autoencoder decodes for `rows` samples: each latent frame is an image."""
        size = request.latent_size
        return rows * size.frames, config.channels, size.height, size.width

    @abstractmethod
    def decode(self, vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
        """Frames `[B, F, H, W, 3]` in -1..1 of the final latents; an image is one frame."""


def image_frames(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` as videos of one frame, `[B, 1, H, W, 3]`."""
    return rearrange(images, "b c h w -> b 1 h w c")
