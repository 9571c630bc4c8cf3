"""FLUX.1 dev and schnell: pooled CLIP embedding, T5 tokens, latents packed in 2 x 2 patches, embedded guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from sglang_gen.engine.denoise import Predict, draw_noise
from sglang_gen.engine.sparse_attention import Grid
from sglang_gen.families import flow_matching, img2img, prediction, text_encoding
from sglang_gen.families.contract import ComponentConfig, Request
from sglang_gen.families.flow_matching import FlowMatching
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.models.attention import Attend
from sglang_gen.models.flux import Block, Conditioning, Config, Flux, SingleBlock
from sglang_gen.models.vae import Autoencoder
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.sequence_boundary import Sharding, TokensByKind, shard, shard_sizes
from sglang_gen.parallel.tensor import Columns, Gathered, Heads, Rows, Table
from sglang_gen.weights.load import Rules, renamed

# Dotted parts of our tensor names -> the corresponding parts in a diffusers checkpoint.
NAMES: Rules = {
    "tokens": "x_embedder",
    "timestep_embedder": "time_text_embed.timestep_embedder",
    "guidance_embedder": "time_text_embed.guidance_embedder",
    "pooled_embedder": "time_text_embed.text_embedder",
    "text_embedder": "context_embedder",
    "blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "modulation": "norm",
    "image.modulation": "norm1",
    "text.modulation": "norm1_context",
    "out_modulation": "norm_out",
    "out": "proj_out",
    "image.to_qkv": {"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v"},
    "text.to_qkv": {"q": "attn.add_q_proj", "k": "attn.add_k_proj", "v": "attn.add_v_proj"},
    "image.norms": "attn",
    "text.norms.norm_q": "attn.norm_added_q",
    "text.norms.norm_k": "attn.norm_added_k",
    "image.to_out": "attn.to_out.0",
    "text.to_out": "attn.to_add_out",
    "image.ff": "ff",
    "text.ff": "ff_context",
    "norms": "attn",
    "to_qkv_ff": {"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "ff": "proj_mlp"},
    "to_out": "proj_out",
    "up": "net.0.proj",
    "down": "net.2",
}

TENSOR: Table = {
    "*modulation.linear": Gathered(),
    "blocks.*.image": Heads(),
    "blocks.*.text": Heads(),
    "single_blocks.?": Heads(),
    "single_blocks.??": Heads(),
    "*.to_qkv": Columns(),
    "blocks.*.to_out": Rows(),
    "*.up": Columns(),
    "*.down": Rows(),
    "*.to_qkv_ff": Columns(),
    "single_blocks.*.to_out": Rows(),
}


def attention_ops(network: Flux) -> dict[str, list[Attend]]:
    """The attention ops, all of them over text and image tokens together."""
    return {"joint": [block.attend for block in (*network.blocks, *network.single_blocks)]}


def tokens(config: Config, shape: Sequence[int], images: Sequence[int], texts: Sequence[int]) -> TokensByKind:
    """Tokens of every rank; the latents `[B, L, C]` are sharded along their tokens."""
    return {"joint": tuple(map(sum, zip(images, texts, strict=True)))}


def shard_conditioning(
    config: Config, whole: Conditioning, arguments: tuple[Any, ...], axis: Axis
) -> tuple[Conditioning, tuple[int, ...]]:
    """This rank's conditioning (sharded text and rotary table), and every rank's number of text tokens."""
    rows, columns = arguments[-2:]
    texts, images = shard_sizes(whole.text.shape[1], 1, axis.size), shard_sizes(rows * columns, 1, axis.size)

    def shard_table(table: Tensor) -> Tensor:
        text, image = table.split([sum(texts), sum(images)])
        return torch.cat([shard(text, 0, texts, axis.index), shard(image, 0, images, axis.index)])

    cosines, sines = whole.rotary
    rotary = (shard_table(cosines), shard_table(sines))
    return replace(whole, text=shard(whole.text, 1, texts, axis.index), rotary=rotary), texts


SHARDING = Sharding(
    dim=1, unit=lambda config: 1, attention_ops=attention_ops, tokens=tokens, shard_conditioning=shard_conditioning
)


def sources(name: str) -> dict[str, str]:
    """Names of the checkpoint tensors of our tensor `name`, each with its section of the layer."""
    return renamed(name, NAMES)


def config(diffusers_config: Mapping[str, Any]) -> Config:
    c = diffusers_config
    return Config(
        channels_in=c["in_channels"], channels_out=c.get("out_channels") or c["in_channels"],
        layers=c["num_layers"], single_layers=c["num_single_layers"], heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"], text_width=c["joint_attention_dim"],
        pooled_width=c["pooled_projection_dim"], axes=tuple(c.get("axes_dims_rope") or (16, 56, 56)),
        guidance=bool(c.get("guidance_embeds")),
    )  # fmt: skip


def build(diffusers_config: Mapping[str, Any]) -> nn.Module:
    return Flux(config(diffusers_config))


def _grid(request: Request) -> tuple[int, int]:
    """Rows and columns of packed tokens."""
    size = request.size
    return size.height // (2 * request.factor), size.width // (2 * request.factor)


class FluxPipeline(FlowMatching):
    """FLUX.1. The network sees latents that are packed in 2 x 2 patches, `[B, L, C]`."""

    tensor_parallel = TENSOR
    sharding = SHARDING
    regions = (Block, SingleBlock)

    def build(self, diffusers_config: ComponentConfig) -> nn.Module:
        return build(diffusers_config)

    def sources(self, name: str) -> Mapping[str, str]:
        return sources(name)

    def encode(
        self, components: Mapping[str, Any], diffusers_config: ComponentConfig, texts: list[str], length: int | None
    ) -> tuple[Tensor, Tensor]:
        """T5 hidden states `[B, T, C]` and the pooled CLIP embedding `[B, P]`."""
        pooled = text_encoding.clip_pooled(*text_encoding.encoder_inputs(components, "", texts))
        return text_encoding.t5(
            *text_encoding.encoder_inputs(components, "_2", texts), self.spec.tokens(length)
        ), pooled

    def encoded_shapes(self, configs: Mapping[str, ComponentConfig], length: int | None) -> tuple[tuple[int, ...], ...]:
        """Shapes of the outputs of `encode` for one text, without the batch dimension, from the component configs."""
        network = configs[self.spec.network]
        return (self.spec.tokens(length), network["joint_attention_dim"]), (network["pooled_projection_dim"],)

    def schedule(self, diffusers_config: ComponentConfig, scheduler: Any, request: Request) -> Tensor:
        """Set the timesteps and return those to run, `[S]`."""
        rows, columns = _grid(request)
        sigmas = np.linspace(1.0, 1 / request.steps, request.steps).tolist()
        flow_matching.set_timesteps(scheduler, request.steps, rows * columns, 1.15, sigmas)
        return img2img.remaining_timesteps(scheduler, request.skipped)

    def latents_shape(self, diffusers_config: ComponentConfig, request: Request) -> tuple[int, ...]:
        """Shape of one sample's packed latents `(L, C)`."""
        rows, columns = _grid(request)
        return rows * columns, diffusers_config["in_channels"]

    def draw(
        self,
        diffusers_config: ComponentConfig,
        request: Request,
        generators: Sequence[torch.Generator],
        dtype: torch.dtype,
    ) -> Tensor:
        """Unpacked noise `[B, C, h, w]`."""
        rows, columns = _grid(request)
        return draw_noise((diffusers_config["in_channels"] // 4, 2 * rows, 2 * columns), generators, dtype)

    def start(self, scheduler: Any, timesteps: Tensor, noise: Tensor, source: Tensor | None) -> Tensor:
        """Initial latents, packed in 2 x 2 patches: `[B, L, C]`; see `FlowMatching.start`."""
        latents = super().start(scheduler, timesteps, noise, source)
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    def grids(self, config: Any, request: Request, encoded: Sequence[tuple[Tensor, ...]]) -> list[Grid]:
        """Position of the image tokens in the attention sequence: after the text."""
        return [Grid(*_grid(request), before=encoded[0][0].shape[1])]

    def widest_map(self, diffusers_config: ComponentConfig, request: Request) -> int:
        """Elements of the largest activation of one sample: all image and text tokens."""
        rows, columns = _grid(request)
        return (rows * columns + self.spec.tokens(request.text_length)) * config(diffusers_config).width

    def prepare(
        self, networks: NetworkSchedule, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor, ...]]
    ) -> Predict:
        """The network as a velocity predictor, with the conditioning of all steps computed once."""
        states, pooled = prediction.joined(encoded)
        dtype = states.dtype  # diffusers rounds timesteps and guidance to it before it multiplies them by 1000
        times = timesteps.to(dtype) / 1000 * 1000
        guidance = (torch.tensor(request.guidance, dtype=dtype, device="cpu") * 1000).item()
        return prediction.predictor(networks, times, states, pooled, guidance, *_grid(request))

    def decode(self, vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
        """Frames `[B, 1, H, W, 3]` in -1..1."""
        rows, _ = _grid(request)
        unpacked = rearrange(latents, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)
        return self.decode_scaled(vae, unpacked)


PIPELINE: type[Pipeline] = FluxPipeline
