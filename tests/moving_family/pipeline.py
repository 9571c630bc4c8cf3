"""From a prompt to the frames of a video: a network for high noise, then one for low noise."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from moving_family.network import Block, Config, Moving
from sglang_gen.engine.denoise import Predict
from sglang_gen.engine.sparse_attention import Grid
from sglang_gen.families import flow_matching, prediction, text_encoding
from sglang_gen.families.contract import ComponentConfig, Request
from sglang_gen.families.flow_matching import FlowMatching
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.models.vae import Autoencoder
from sglang_gen.parallel.sequence_boundary import Sharding
from sglang_gen.parallel.tensor import Columns, Heads, Rows, Table
from sglang_gen.weights.load import renamed

TENSOR = {
    "blocks.*.attention": Heads(),
    "*.to_qkv": Columns(),
    "*.to_out": Rows(),
    "*.up": Columns(),
    "*.down": Rows(),
}


def config(diffusers_config: ComponentConfig) -> Config:
    keys = ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "text_width")
    return Config(*(diffusers_config[key] for key in keys))


def not_sharded(*_: Any) -> Any:
    raise AssertionError("the plan refuses sequence parallelism of a video")


class MovingPipeline(FlowMatching):
    tensor_parallel = cast(Table, TENSOR)
    sharding = Sharding(
        dim=2,
        unit=lambda config: 1,
        attention_ops=lambda network: {"video": [block.attention.attend for block in network.blocks]},
        tokens=not_sharded,
        shard_conditioning=not_sharded,
    )
    regions = (Block,)

    def build(self, diffusers_config: ComponentConfig) -> nn.Module:
        return Moving(config(diffusers_config))

    def sources(self, name: str) -> Mapping[str, str]:
        return renamed(name, {"to_qkv": {"q": "to_q", "k": "to_k", "v": "to_v"}})

    def encode(
        self, components: Mapping[str, Any], diffusers_config: ComponentConfig, texts: list[str], length: int | None
    ) -> tuple[Tensor]:
        return (text_encoding.clip_last(*text_encoding.encoder_inputs(components, "", texts)),)

    def encoded_shapes(self, configs: Mapping[str, ComponentConfig], length: int | None) -> tuple[tuple[int, ...], ...]:
        return ((configs["text_encoder"]["max_position_embeddings"], configs[self.spec.network]["text_width"]),)

    def schedule(self, diffusers_config: ComponentConfig, scheduler: Any, request: Request) -> Tensor:
        flow_matching.set_timesteps(scheduler, request.steps, 1, 1.15)
        timesteps: Tensor = scheduler.timesteps
        return timesteps

    def network_names(self, timesteps: Tensor, request: Request) -> tuple[str, ...]:
        """The second network from the model's boundary on; a model without one has one network."""
        if request.boundary is None:
            return super().network_names(timesteps, request)
        high, low = self.spec.networks
        return tuple(high if time >= 1000 * request.boundary else low for time in timesteps.tolist())

    def latents_shape(self, diffusers_config: ComponentConfig, request: Request) -> tuple[int, ...]:
        size = request.latent_size
        return diffusers_config["in_channels"], size.frames, size.height, size.width

    def grids(self, config: Any, request: Request, encoded: Sequence[tuple[Tensor, ...]]) -> list[Grid]:
        raise AssertionError("the plan refuses patterns of rows and columns for a video")

    def widest_map(self, diffusers_config: ComponentConfig, request: Request) -> int:
        size = request.latent_size
        return size.frames * size.height * size.width * config(diffusers_config).width

    def prepare(
        self, networks: NetworkSchedule, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor, ...]]
    ) -> Predict:
        size = request.latent_size
        (text,) = prediction.joined(encoded)
        return prediction.predictor(networks, timesteps, text, size.frames, size.height, size.width)

    def decode(self, vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
        """Frames `[B, F, H, W, 3]`: the first latent frame once, each other one as often as there are frames in it."""
        images = self.decode_scaled(vae, rearrange(latents, "b c f h w -> (b f) c h w"))
        frames = rearrange(images, "(b f) 1 h w c -> b f h w c", b=len(latents))
        assert self.spec.video is not None
        step = self.spec.video.step
        latent_frame = [0, *(1 + number // step for number in range(request.size.frames - 1))]
        return frames[:, torch.tensor(latent_frame)]


PIPELINE = MovingPipeline
