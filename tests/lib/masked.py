"""A small transformer over text and image tokens that masks the padding of its texts: in one process and on ranks."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from on_meta import on_meta
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen.engine import attention_kernels
from sglang_gen.engine.cfg import Guidance, guided
from sglang_gen.engine.meta_trace import trace_on_meta
from sglang_gen.families import prediction
from sglang_gen.hub.component_folder import in_folder
from sglang_gen.models.attention import QKV, Attend, SelfAttention
from sglang_gen.models.chain import Chain
from sglang_gen.models.layers import WHOLE, Embedder, FeedForward, Linear, sinusoid
from sglang_gen.parallel.collectives import counted
from sglang_gen.parallel.mesh import Mesh
from sglang_gen.parallel.sequence import Lengths, Ring
from sglang_gen.parallel.sequence_boundary import Sharding, shard, shard_sizes
from sglang_gen.parallel.sharded_network import ParallelNetwork, Split
from sglang_gen.parallel.spatial import RowAttention
from sglang_gen.parallel.tensor import Columns, Heads, Rows
from sglang_gen.weights.load import load


@dataclass(frozen=True)
class Config:
    channels: int = 4
    text_width: int = 6
    width: int = 32
    heads: int = 4
    layers: int = 3


@dataclass(frozen=True)
class Conditioning:
    text: Tensor  # [B, T, D]
    mask: Tensor | None  # [B, T]
    times: Tensor  # [S, D]

    @cached_property
    def steps(self) -> "list[Conditioning]":
        return [replace(self, times=time) for time in self.times]


class Block(nn.Module):
    """Attention over text and image together, and a feed-forward."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = Linear(config.width, dict.fromkeys(QKV, config.width))
        self.attend = Attend()
        self.to_out = Linear(config.width, config.width)
        self.ff = FeedForward(config.width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image `[B, L, D]`, text `[B, T, D]`, mask of both `[B, T + L]`."""
        both = torch.cat([text, x], dim=1)
        q, k, v = rearrange(self.to_qkv(F.layer_norm(both, both.shape[-1:])), "b l (n h d) -> n b h l d", n=3,
                            h=self.heads)  # fmt: skip
        both = both + self.to_out(rearrange(self.attend(q, 3 * k, v, mask), "b h l d -> b l (h d)"))
        both = both + self.ff(F.layer_norm(both, both.shape[-1:]))
        text, x = both.split([text.shape[1], x.shape[1]], dim=1)
        return x.contiguous(), text.contiguous()


class Masked(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = Linear(config.channels, config.width)
        self.text_embedder = Linear(config.text_width, config.width)
        self.timestep_embedder = Embedder(64, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.out = Linear(config.width, config.channels)
        self.chain = Chain()

    def condition(self, timesteps: Tensor, text: Tensor, mask: Tensor | None = None) -> Conditioning:
        """Timesteps `[S]`, text `[B, T, C]` and the mask of its tokens `[B, T]`."""
        return Conditioning(self.text_embedder(text), mask, self.timestep_embedder(sinusoid(timesteps, 64).to(text)))

    def forward(self, latents: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """Latents `[B, L, C]` -> a prediction of the same shape."""
        return self.evaluate(latents, conditioning.steps[step])

    def evaluate(self, latents: Tensor, c: Conditioning) -> Tensor:
        x = self.tokens(latents) + c.times
        mask = None if c.mask is None else torch.cat([c.mask, c.mask.new_ones(x.shape[:2])], dim=1)
        x, _ = self.chain([*self.blocks], (x, c.text), [()] * len(self.blocks), mask)
        return self.out(x)


TENSOR = {
    "blocks.?": Heads(),
    "*.to_qkv": Columns(),
    "blocks.*.to_out": Rows(),
    "*.up": Columns(),
    "*.down": Rows(),
}


def shard_conditioning(config: Config, whole: Conditioning, arguments: Any, axis: Any) -> Any:
    """The mask is sharded as its text is."""
    texts = shard_sizes(whole.text.shape[1], 1, axis.size)
    text, mask = (
        None if tensor is None else shard(tensor, 1, texts, axis.index) for tensor in (whole.text, whole.mask)
    )
    return replace(whole, text=text, mask=mask), texts


SHARDING = Sharding(
    dim=1,
    unit=lambda config: 1,
    attention_ops=lambda network: {"joint": [block.attend for block in network.blocks]},
    tokens=lambda config, shape, images, texts: {"joint": tuple(map(sum, zip(images, texts, strict=True)))},
    shard_conditioning=shard_conditioning,
)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def store(folder: Path, network: nn.Module) -> Path:
    """Random weights of a network, in float64."""
    torch.manual_seed(0)
    tensors = {}
    for name, tensor in network.double().state_dict().items():
        tensors[name] = torch.randn_like(tensor) * (tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.2)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    return folder


def placed(mesh: Mesh, folder: Path, kernel: str = "sdpa", summing: bool = True) -> ParallelNetwork:
    """This rank's network in float64 with one of the kernels, or with it and without its log-sum-exp."""
    split = Split(mesh, TENSOR, SHARDING)
    build = partial(Masked, Config())
    network = load(build, in_folder(folder), lambda name: {name: WHOLE}, torch.float64, "cpu", split.shrink)
    whole = split.parallelize(network)
    with_lse = attention_kernels.kernel_with_lse(kernel, "cpu", torch.float64, masked=True) if summing else None
    whole.set_kernel(attention_kernels.named(kernel).kernel, with_lse)
    return whole


TIMESTEPS = torch.tensor([900.0, 500.0, 20.0], dtype=torch.float64)


def evaluate(mesh: Mesh, folder: Path, latents: Tensor, text: Tensor, mask: Tensor | None, kernel: str = "sdpa",
             summing: bool = True) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """(the predictions of two steps, what was sent for the second, what a trace on meta says is sent for it)."""
    whole = placed(mesh, folder, kernel, summing)
    conditioning = whole.entrance.condition(TIMESTEPS, text, mask)
    outputs = []
    for step in (0, 2):
        with counted() as traffic:
            outputs.append(whole.entrance(latents, conditioning, step))
    traced = on_meta(Split(mesh, TENSOR, SHARDING), partial(Masked, Config()), torch.float64)
    given = [None if tensor is None else tensor.to("meta") for tensor in (TIMESTEPS, text, mask)]
    predicted = []

    def send(network: Any) -> None:
        with counted() as sent:
            network(latents.to("meta"), network.condition(*given), 2)
        predicted.append(sent)

    trace_on_meta(traced, (), send)
    return torch.stack(outputs), traffic, predicted[0]


def in_turn(mesh: Mesh, folder: Path, latents: Tensor, texts: Any, compiled: str) -> tuple[list[Tensor], int]:
    """(outputs of two steps in which texts take turns, graphs that were compiled); blocks or all of it are compiled."""
    whole = placed(mesh, folder)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    kind = {"regional": Block, "full": Masked}.get(compiled, ())
    for module in whole.network.modules():
        if isinstance(module, kind):
            method = "forward" if compiled == "regional" else "evaluate"
            setattr(module, method, torch.compile(getattr(module, method), backend=backend, fullgraph=True,
                                                  dynamic=False))  # fmt: skip
    conditionings = [whole.entrance.condition(TIMESTEPS, *text) for text in texts]
    torch._dynamo.reset()
    try:
        return [whole.entrance(latents, each, step) for step in (0, 2) for each in conditionings], len(graphs)
    finally:
        torch._dynamo.reset()


def guide(mesh: Mesh, folder: Path, latents: Tensor, encoded: Any, guidance: Guidance) -> Tensor:
    """Guided predictions of the first and the last timestep."""
    network = placed(mesh, folder).entrance

    def prepare(branches: Any) -> Any:
        schedule = prediction.NetworkSchedule.of_one(network, len(TIMESTEPS))
        return prediction.predictor(schedule, TIMESTEPS, *prediction.joined(branches))

    predict = guided(prepare, encoded, guidance, range(3), mesh.axis("cfg"))
    return torch.stack([predict(latents, index) for index in (0, 2)])


def ring(mesh: Mesh, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, tokens: tuple[int, ...], name: str) -> Tensor:
    """Attention of this rank's queries to the masked keys `[B, H, S, D]` of all ranks."""
    axis = mesh.axis("ring")
    kernel = attention_kernels.kernel_with_lse(name, "cpu", q.dtype, masked=True)
    q, k, v, mask = (shard(x, x.ndim - 2 if x.ndim > 2 else 1, tokens, axis.index) for x in (q, k, v, mask))
    attend = Attend()
    attend.kernel = Ring(kernel, axis, Lengths(len(tokens), 1, tokens))
    return attend(q, k, v, mask)


def rows(mesh: Mesh, layer: SelfAttention, x: Tensor, mask: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Self-attention of this rank's tokens to the masked tokens of all ranks, gathered while queries are computed."""
    axis = mesh.axis("ring")
    x, mask = (shard(each, 1, tokens, axis.index) for each in (x, mask))
    return RowAttention(layer, axis, Lengths(len(tokens), 1, tokens))(x, mask)


def alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of each sample to its own keys, without a mask; 0 for a sample without keys."""
    return torch.cat(
        [
            scaled_dot_product_attention(q[i : i + 1], k[i : i + 1, :, seen], v[i : i + 1, :, seen])
            if seen.any()
            else torch.zeros_like(q[i : i + 1])
            for i, seen in enumerate(mask)
        ]
    )
