"""Shared by the UNet pipelines: weight names, config, sharding, timesteps and initial latents."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sglang_gen.engine.sparse_attention import Grid
from sglang_gen.errors import UserError, in_our_words
from sglang_gen.families import img2img
from sglang_gen.families.contract import ComponentConfig, Request
from sglang_gen.families.pipeline_contract import Pipeline
from sglang_gen.families.unet_spec import UNET_DEFAULTS, for_each_level
from sglang_gen.models.attention import Attend
from sglang_gen.models.unet import Block, Conditioning, Config, LevelConfig, Residual, UNet
from sglang_gen.parallel.collectives import Axis
from sglang_gen.parallel.sequence_boundary import Sharding, TokensByKind
from sglang_gen.parallel.tensor import Columns, Heads, Rows, Table
from sglang_gen.weights.load import Rules, renamed

CLIP_LENGTH = 77  # tokens, transformers' default if the config has no max_position_embeddings

# Dotted parts of our tensor names -> the corresponding parts in a diffusers checkpoint.
NAMES: Rules = {
    "time_embedder": "time_embedding",
    "added_embedder": "add_embedding",
    "down": "down_blocks",
    "middle": "mid_block",
    "up": "up_blocks",
    "residuals": "resnets",
    "transformers": "attentions",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "norm_1": "norm1",
    "norm_2": "norm2",
    "norm_3": "norm3",
    "conv_1": "conv1",
    "conv_2": "conv2",
    "time": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "project_in": "proj_in",
    "project_out": "proj_out",
    "blocks": "transformer_blocks",
    "self_attention.to_qkv": {"q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v"},
    "self_attention.to_out": "attn1.to_out.0",
    "cross_attention.to_q": "attn2.to_q",
    "cross_attention.to_kv": {"k": "attn2.to_k", "v": "attn2.to_v"},
    "cross_attention.to_out": "attn2.to_out.0",
    "ff.up": "ff.net.0.proj",
    "ff.down": "ff.net.2",
    "norm_out": "conv_norm_out",
}

# Residual blocks are sharded along the channels between their convolutions, so norm_2 keeps whole groups.
TENSOR: Table = {
    "*.residuals.*.conv_1": Columns(),
    "*.residuals.*.time": Columns(),
    "*.residuals.*.norm_2": Columns(),
    "*.residuals.*.conv_2": Rows(),
    "*.self_attention": Heads(),
    "*.cross_attention": Heads(),
    "*.to_qkv": Columns(),
    "*.to_q": Columns(),
    "*.to_kv": Columns(),
    "*.to_out": Rows(),
    "*.up": Columns(),
    "*.down": Rows(),
}


def sources(name: str) -> dict[str, str]:
    """Names of the checkpoint tensors of our tensor `name`, each with its section of the layer."""
    return renamed(name, NAMES)


def config(diffusers_config: Mapping[str, Any]) -> Config:
    """Our config. A UNet's `attention_head_dim` is its number of heads, a misnomer that diffusers keeps."""
    c = {**UNET_DEFAULTS, **diffusers_config}
    levels = len(c["block_out_channels"])
    columns = [
        for_each_level(c[key], levels)
        for key in ("block_out_channels", "attention_head_dim", "layers_per_block", "transformer_layers_per_block")
    ]
    rows = list(zip(*columns, strict=True))
    width, heads, _, depth = rows[-1]
    return Config(
        channels_in=c["in_channels"], channels_out=c["out_channels"],
        down=tuple(
            LevelConfig(width, heads, blocks, depth if "CrossAttn" in kind else 0)
            for (width, heads, blocks, depth), kind in zip(rows, c["down_block_types"], strict=True)
        ),
        middle=LevelConfig(width, heads, 2, depth),
        up=tuple(
            LevelConfig(width, heads, blocks + 1, depth if "CrossAttn" in kind else 0)
            for (width, heads, blocks, depth), kind in zip(reversed(rows), c["up_block_types"], strict=True)
        ),
        text_width=c["cross_attention_dim"], groups=c["norm_num_groups"], eps=c["norm_eps"],
        size_width=c.get("addition_time_embed_dim") or 0,
        added_width=c["projection_class_embeddings_input_dim"] if c.get("addition_embed_type") else 0,
    )  # fmt: skip


def build(diffusers_config: Mapping[str, Any]) -> nn.Module:
    return UNet(config(diffusers_config))


def attention_ops(network: UNet) -> dict[str, list[Attend]]:
    """Self-attention ops by the number of downsamplings before them."""
    ops: dict[str, list[Attend]] = {}
    coarsest = len(network.down) - 1
    depths = [*range(len(network.down)), coarsest, *range(coarsest, -1, -1)]
    for depth, level in zip(depths, network.levels(), strict=True):
        blocks = [block for transformer in level.transformers for block in transformer.blocks]
        ops.setdefault(str(depth), []).extend(block.self_attention.attend for block in blocks)
    return ops


def tokens(config: Config, shape: Sequence[int], rows: Sequence[int], texts: Sequence[int]) -> TokensByKind:
    """Tokens of every rank at each level; the latents `[B, C, h, w]` are sharded along their rows."""
    sides = [(tuple(rows), shape[-1])]
    for _ in config.down[1:]:
        above, columns = sides[-1]
        sides.append((tuple(-(-count // 2) for count in above), -(-columns // 2)))
    return {str(depth): tuple(count * columns for count in counts) for depth, (counts, columns) in enumerate(sides)}


def shard_conditioning(
    config: Config, whole: Conditioning, arguments: tuple[Any, ...], axis: Axis
) -> tuple[Conditioning, tuple[int, ...]]:
    """The conditioning is replicated on every rank, and so is the text."""
    return whole, ()


SHARDING = Sharding(
    dim=2,
    unit=lambda config: 2 ** (len(config.down) - 1),
    attention_ops=attention_ops,
    tokens=tokens,
    shard_conditioning=shard_conditioning,
    spatial=True,
)


class UNetPipeline(Pipeline):
    """Network, schedule and initial latents of the UNet pipelines."""

    tensor_parallel = TENSOR
    sharding = SHARDING
    regions = (Residual, Block)

    def build(self, diffusers_config: ComponentConfig) -> nn.Module:
        return build(diffusers_config)

    def sources(self, name: str) -> Mapping[str, str]:
        return sources(name)

    def text_shape(self, configs: Mapping[str, ComponentConfig]) -> tuple[int, int]:
        """Tokens and channels of an encoded prompt, from the component configs."""
        width = {**UNET_DEFAULTS, **configs[self.spec.network]}["cross_attention_dim"]
        return configs["text_encoder"].get("max_position_embeddings", CLIP_LENGTH), width

    def grids(self, config: Any, request: Request, encoded: Sequence[tuple[Tensor, ...]]) -> list[Grid]:
        """The token grid of every level; each level halves rows and columns, rounded up."""
        sizes = [(request.latent_size.height, request.latent_size.width)]
        for _ in config.down[1:]:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return [Grid(*size) for size in sizes]

    def skipped(self, steps: int, strength: float) -> int:
        """Steps that image-to-image skips at a noise `strength` in 0..1."""
        return steps - min(int(steps * strength), steps)

    def schedule(self, diffusers_config: ComponentConfig, scheduler: Any, request: Request) -> Tensor:
        """Set the timesteps and return those to run, `[S]`. Raises UserError if the scheduler cannot sample a UNet."""
        kind = type(scheduler).__name__
        try:
            scheduler.set_timesteps(request.steps)
        except ValueError as error:
            raise UserError(f"{kind} refuses {request.steps} steps: {in_our_words(error)}") from error
        if not hasattr(scheduler, "init_noise_sigma") or not hasattr(scheduler, "scale_model_input"):
            raise UserError(f"{kind} is not a scheduler for diffusion models, so it cannot sample from this UNet")
        return img2img.remaining_timesteps(scheduler, request.skipped)

    def latents_shape(self, diffusers_config: ComponentConfig, request: Request) -> tuple[int, ...]:
        """Shape of one sample's latents, without the batch dimension."""
        return diffusers_config.get("in_channels", 4), request.latent_size.height, request.latent_size.width

    def widest_map(self, diffusers_config: ComponentConfig, request: Request) -> int:
        """Elements of the largest feature map of one sample: the one at the first level."""
        size = request.latent_size
        return int({**UNET_DEFAULTS, **diffusers_config}["block_out_channels"][0]) * size.height * size.width

    def start(self, scheduler: Any, timesteps: Tensor, noise: Tensor, source: Tensor | None) -> Tensor:
        """Initial latents `[B, C, h, w]`: noise, or the input image's latents `source` with noise added."""
        if source is None:
            return noise * scheduler.init_noise_sigma
        return scheduler.add_noise(source, noise, timesteps[:1].repeat(len(noise)))
