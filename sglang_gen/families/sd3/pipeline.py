"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, flow matching, an autoencoder with a shift factor."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sglang_gen.engine.denoise import Predict
from sglang_gen.engine.sparse_attention import Grid
from sglang_gen.families import flow_matching, img2img, prediction, text_encoding
from sglang_gen.families.contract import ComponentConfig, Request
from sglang_gen.families.flow_matching import FlowMatching
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.families.prediction import NetworkSchedule
from sglang_gen.models.attention import Attend
from sglang_gen.models.sd3 import SD3, Block, Conditioning, Config
from sglang_gen.models.vae import Autoencoder
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.sequence_boundary import Sharding, TokensByKind, shard, shard_sizes
from sglang_gen.parallel.tensor import Columns, Gathered, Heads, Rows, Table
from sglang_gen.weights.load import Rules, renamed

CLIP_LENGTH = 77  # tokens

# Dotted parts of our tensor names -> the corresponding parts in a diffusers checkpoint.
NAMES: Rules = {
    "patches": "pos_embed.proj",
    "positions": "pos_embed.pos_embed",
    "timestep_embedder": "time_text_embed.timestep_embedder",
    "pooled_embedder": "time_text_embed.text_embedder",
    "text_embedder": "context_embedder",
    "blocks": "transformer_blocks",
    "modulation": "norm1",
    "text_modulation": "norm1_context",
    "out_modulation": "norm_out",
    "out": "proj_out",
    "attention.image": "attn",
    "attention.image.to_qkv": {"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v"},
    "attention.text.to_qkv": {"q": "attn.add_q_proj", "k": "attn.add_k_proj", "v": "attn.add_v_proj"},
    "attention.text.norm_q": "attn.norm_added_q",
    "attention.text.norm_k": "attn.norm_added_k",
    "attention.to_out": "attn.to_out.0",
    "attention.to_text_out": "attn.to_add_out",
    "attention_2.image": "attn2",
    "attention_2.image.to_qkv": {"q": "attn2.to_q", "k": "attn2.to_k", "v": "attn2.to_v"},
    "attention_2.to_out": "attn2.to_out.0",
    "ff_text": "ff_context",
    "up": "net.0.proj",
    "down": "net.2",
}

TENSOR: Table = {
    "*modulation.linear": Gathered(),
    "blocks.*.attention*.image": Heads(),
    "blocks.*.attention.text": Heads(),
    "blocks.*.to_qkv": Columns(),
    "blocks.*.to_out": Rows(),
    "blocks.*.to_text_out": Rows(),
    "blocks.*.up": Columns(),
    "blocks.*.down": Rows(),
}


def attention_ops(network: SD3) -> dict[str, list[Attend]]:
    """The attention ops over image and text tokens ("joint"), and those over image tokens only ("image")."""
    blocks: list[Any] = list(network.blocks)
    return {
        "joint": [block.attention.attend for block in blocks],
        "image": [block.attention_2.attend for block in blocks if block.attention_2 is not None],
    }


def tokens(config: Config, shape: Sequence[int], rows: Sequence[int], texts: Sequence[int]) -> TokensByKind:
    """Tokens of every rank in both kinds of attention; the latents `[B, C, h, w]` are sharded along their rows."""
    columns = shape[-1] // config.patch
    images = [count // config.patch * columns for count in rows]
    return {"joint": tuple(map(sum, zip(images, texts, strict=True))), "image": tuple(images)}


def shard_conditioning(
    config: Config, whole: Conditioning, arguments: tuple[Any, ...], axis: Axis
) -> tuple[Conditioning, tuple[int, ...]]:
    """This rank's conditioning (sharded text and position embeddings), and every rank's number of text tokens."""
    height, width = arguments[-2:]
    texts = shard_sizes(whole.text.shape[1], 1, axis.size)
    images = tokens(config, (height, width), shard_sizes(height, config.patch, axis.size), texts)["image"]
    mine = replace(
        whole, text=shard(whole.text, 1, texts, axis.index), positions=shard(whole.positions, 0, images, axis.index)
    )
    return mine, texts


SHARDING = Sharding(
    dim=2,
    unit=lambda config: config.patch,
    attention_ops=attention_ops,
    tokens=tokens,
    shard_conditioning=shard_conditioning,
)


def sources(name: str) -> dict[str, str]:
    """Names of the checkpoint tensors of our tensor `name`, each with its section of the layer."""
    return renamed(name, NAMES)


def config(diffusers_config: Mapping[str, Any]) -> Config:
    c = diffusers_config
    return Config(
        patch=c["patch_size"], channels_in=c["in_channels"], channels_out=c.get("out_channels") or c["in_channels"],
        layers=c["num_layers"], heads=c["num_attention_heads"], head_dim=c["attention_head_dim"],
        text_width=c["joint_attention_dim"], pooled_width=c["pooled_projection_dim"],
        positions=c["pos_embed_max_size"], dual_layers=tuple(c.get("dual_attention_layers") or ()),
        qk_norm=c.get("qk_norm") == "rms_norm",
    )  # fmt: skip


def build(diffusers_config: Mapping[str, Any]) -> nn.Module:
    return SD3(config(diffusers_config))


class SD3Pipeline(FlowMatching):
    """Stable Diffusion 3 and 3.5."""

    tensor_parallel = TENSOR
    sharding = SHARDING
    regions = (Block,)

    def build(self, diffusers_config: ComponentConfig) -> nn.Module:
        return build(diffusers_config)

    def sources(self, name: str) -> Mapping[str, str]:
        return sources(name)

    def encode(
        self, components: Mapping[str, Any], diffusers_config: ComponentConfig, texts: list[str], length: int | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, T, C]` and pooled embeddings `[B, P]`.

        Both CLIP encoders are concatenated along the channels, T5's tokens are appended. Without a T5 its tokens are
        zeros, as in diffusers.
        """
        first, pooled = text_encoding.clip(components["text_encoder"], components["tokenizer"], texts)
        second, pooled_2 = text_encoding.clip(components["text_encoder_2"], components["tokenizer_2"], texts)
        both = torch.cat([first, second], dim=-1)
        width, length = diffusers_config["joint_attention_dim"], self.spec.tokens(length)
        if "text_encoder_3" in components:
            t5 = text_encoding.t5(components["text_encoder_3"], components["tokenizer_3"], texts, length)
        else:
            t5 = both.new_zeros(len(texts), length, width)
        return torch.cat([text_encoding.pad_channels(both, width), t5], dim=1), torch.cat([pooled, pooled_2], dim=-1)

    def encoded_shapes(self, configs: Mapping[str, ComponentConfig], length: int | None) -> tuple[tuple[int, ...], ...]:
        """Shapes of the outputs of `encode` for one text, without the batch dimension, from the component configs."""
        network, clip = configs[self.spec.network], configs["text_encoder"].get("max_position_embeddings", CLIP_LENGTH)
        return (clip + self.spec.tokens(length), network["joint_attention_dim"]), (network["pooled_projection_dim"],)

    def schedule(self, diffusers_config: ComponentConfig, scheduler: Any, request: Request) -> Tensor:
        """Set the timesteps and return those to run, `[S]`."""
        size, patch = request.latent_size, diffusers_config["patch_size"]
        flow_matching.set_timesteps(scheduler, request.steps, (size.height // patch) * (size.width // patch), 1.16)
        return img2img.remaining_timesteps(scheduler, request.skipped)

    def grids(self, config: Any, request: Request, encoded: Sequence[tuple[Tensor, ...]]) -> list[Grid]:
        """Position of the image tokens in the attention sequences: before the text, or without text."""
        rows, columns = request.latent_size.height // config.patch, request.latent_size.width // config.patch
        return [Grid(rows, columns, after=encoded[0][0].shape[1]), Grid(rows, columns)]

    def latents_shape(self, diffusers_config: ComponentConfig, request: Request) -> tuple[int, ...]:
        """Shape of one sample's latents, without the batch dimension."""
        return diffusers_config["in_channels"], request.latent_size.height, request.latent_size.width

    def widest_map(self, diffusers_config: ComponentConfig, request: Request) -> int:
        """Elements of the largest activation of one sample: all image and text tokens."""
        size, patch = request.latent_size, diffusers_config["patch_size"]
        tokens = (size.height // patch) * (size.width // patch) + CLIP_LENGTH + self.spec.tokens(request.text_length)
        return tokens * config(diffusers_config).width

    def prepare(
        self, networks: NetworkSchedule, timesteps: Tensor, request: Request, encoded: Sequence[tuple[Tensor, ...]]
    ) -> Predict:
        """The network as a velocity predictor, with the conditioning of all steps computed once."""
        size = request.latent_size
        return prediction.predictor(networks, timesteps, *prediction.joined(encoded), size.height, size.width)

    def decode(self, vae: Autoencoder, latents: Tensor, request: Request) -> Tensor:
        """Frames `[B, 1, H, W, 3]` in -1..1."""
        return self.decode_scaled(vae, latents)


PIPELINE: type[Pipeline] = SD3Pipeline
