"""FLUX.1 dev and schnell (Black Forest Labs 2024): a transformer on packed latents with rotary embeddings.

The first blocks have separate text and image streams with joint attention; the following ones have a single stream with
parallel attention and feed-forward (Dehghani et al. 2023). As in SD3, `condition` computes all steps' modulations.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sglang_gen.models import chain
from sglang_gen.models.attention import QKV, Attend
from sglang_gen.models.chain import Chain
from sglang_gen.models.layers import Embedder, FeedForward, Linear, Modulation, modulate, sinusoid

THETA = 10000.0  # base of the rotary frequencies


@dataclass(frozen=True)
class Config:
    channels_in: int  # of a packed token: 4 x the latent channels
    channels_out: int
    layers: int
    single_layers: int
    heads: int
    head_dim: int
    text_width: int
    pooled_width: int
    axes: tuple[int, ...]  # rotary channels for (stream, row, column); their sum is head_dim
    guidance: bool  # whether the guidance scale is an input, as in dev

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Conditioning:
    """Inputs that are computed once for all steps. S steps, batch B, T text tokens, L image tokens, width D."""

    text: Tensor  # [B, T, D]
    rotary: tuple[Tensor, Tensor]  # cosines and sines [T + L, head_dim]
    blocks: list[tuple[Tensor, ...]]  # modulations [S, B, 6, D] of image and text; [S, B, 3, D] of a single block
    out_modulation: Tensor  # [S, B, 2, D]

    @cached_property
    def steps(self) -> "list[Conditioning]":
        """The conditioning of each step, without the dimension S."""
        return [
            replace(self, blocks=chain.at(step, self.blocks), out_modulation=modulation)
            for step, modulation in enumerate(self.out_modulation)
        ]


def rotary_table(positions: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Positions `[N, axes]` -> cosines and sines `[N, head_dim]`, each value repeated twice (Su et al. 2021)."""
    angles = []
    for column, width in zip(positions.double().T, axes, strict=True):
        frequencies = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
        angles.append(torch.outer(column, frequencies).repeat_interleave(2, dim=1))
    table = torch.cat(angles, dim=1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of adjacent channels of `[B, H, N, D]` by the angles of their position, in float32 or wider."""
    cosines, sines = rotary
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x * cosines + rotated * sines).to(x.dtype)


class Norms(nn.Module):
    """RMS norms of query and key, per head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_q = nn.RMSNorm(width, eps=1e-6)
        self.norm_k = nn.RMSNorm(width, eps=1e-6)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, L, 3 D]` -> three of `[B, H, L, D/H]`."""
        q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=heads)
        return self.norm_q(q), self.norm_k(k), v


class Stream(nn.Module):
    """The layers that a block has separately for the text and the image stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.modulation = Modulation(config.width, 6)
        self.to_qkv = Linear(config.width, dict.fromkeys(QKV, config.width))
        self.norms = Norms(config.head_dim)
        self.to_out = Linear(config.width, config.width)
        self.ff = FeedForward(config.width)

    def qkv(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale = m[:, 0:1], m[:, 1:2]
        return self.norms(self.to_qkv(modulate(x, shift, scale)), self.heads)

    def finish(self, x: Tensor, attended: Tensor, m: Tensor) -> Tensor:
        _, _, gate, shift_ff, scale_ff, gate_ff = m.split(1, dim=1)
        x = x + gate * self.to_out(attended)
        return x + gate_ff * self.ff(modulate(x, shift_ff, scale_ff))


class Block(nn.Module):
    """Double stream block: separate text and image streams with joint attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image, self.text = Stream(config), Stream(config)
        self.attend = Attend()

    def forward(
        self, x: Tensor, text: Tensor, m: Tensor, n: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Image `[B, L, D]`, text `[B, T, D]`, their modulations `[B, 6, D]`."""
        pairs = zip(self.text.qkv(text, n), self.image.qkv(x, m), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        both = rearrange(self.attend(rotate(q, rotary), rotate(k, rotary), v), "b h l d -> b l (h d)")
        text_attended, attended = both.split([text.shape[1], x.shape[1]], dim=1)
        return self.image.finish(x, attended, m), self.text.finish(text, text_attended, n)


class SingleBlock(nn.Module):
    """Single stream block: attention and feed-forward in parallel, with fused input and output projections."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.modulation = Modulation(config.width, 3)
        self.to_qkv_ff = Linear(config.width, dict.fromkeys(QKV, config.width) | {"ff": 4 * config.width})
        self.norms = Norms(config.head_dim)
        self.attend = Attend()
        self.to_out = Linear({"attended": config.width, "ff": 4 * config.width}, config.width)

    def forward(self, x: Tensor, text: Tensor, m: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Image `[B, L, D]`, text `[B, T, D]`, the modulation of both `[B, 3, D]`."""
        shift, scale, gate = m.split(1, dim=1)
        both = torch.cat([modulate(text, shift, scale), modulate(x, shift, scale)], dim=1)
        qkv, inner = self.to_qkv_ff.split(self.to_qkv_ff(both), QKV, ("ff",))
        q, k, v = self.norms(qkv, self.heads)
        attended = rearrange(self.attend(rotate(q, rotary), rotate(k, rotary), v), "b h l d -> b l (h d)")
        out = gate * self.to_out(torch.cat([attended, F.gelu(inner, approximate="tanh")], dim=-1))
        text_out, x_out = out.split([text.shape[1], x.shape[1]], dim=1)
        return x + x_out, text + text_out  # new tensors: compiled code guards on strides


class Flux(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = Linear(config.channels_in, config.width)
        self.timestep_embedder = Embedder(256, config.width)
        self.guidance_embedder = Embedder(256, config.width) if config.guidance else None
        self.pooled_embedder = Embedder(config.pooled_width, config.width)
        self.text_embedder = Linear(config.text_width, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_layers))
        self.out_modulation = Modulation(config.width, 2)
        self.out = Linear(config.width, config.channels_out)
        self.chain = Chain()

    def condition(
        self, timesteps: Tensor, text: Tensor, pooled: Tensor, guidance: float, rows: int, columns: int
    ) -> Conditioning:
        """Timesteps `[S]` in 0..1000, text `[B, T, C]`, pooled text `[B, P]`; `rows` x `columns` packed tokens.

        `guidance` is 1000 times the guidance scale, as timesteps are 1000 times the time.
        """
        times = sinusoid(timesteps.to(pooled.device), 256)
        vector = self.timestep_embedder(times.to(pooled.dtype))[:, None]  # [S, 1, D]
        if self.guidance_embedder is not None:
            scale = torch.full((1,), guidance, device=pooled.device)
            vector = vector + self.guidance_embedder(sinusoid(scale, 256).to(pooled.dtype))
        vector = vector + self.pooled_embedder(pooled)  # [S, B, D]
        return Conditioning(
            self.text_embedder(text),
            rotary_table(_positions(text.shape[1], rows, columns, text.device), self.config.axes),
            [
                *((block.image.modulation(vector), block.text.modulation(vector)) for block in self.blocks),
                *((block.modulation(vector),) for block in self.single_blocks),
            ],
            self.out_modulation(vector),
        )

    def forward(self, latents: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """Velocity `[B, L, C]` of packed latents at the step's timestep."""
        return self.evaluate(latents, conditioning.steps[step])

    def evaluate(self, latents: Tensor, c: Conditioning) -> Tensor:
        """`forward` for the conditioning of one step."""
        blocks = [*self.blocks, *self.single_blocks]
        x, _ = self.chain(blocks, (self.tokens(latents), c.text), c.blocks, c.rotary)
        scale, shift = c.out_modulation.split(1, dim=1)
        return self.out(modulate(x, shift, scale))


def _positions(text: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(stream, row, column) of all tokens, `[text + rows * columns, 3]`; text tokens are at the origin."""
    grid = torch.zeros(rows, columns, 3, device=device)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)
    return torch.cat([grid.new_zeros(text, 3), rearrange(grid, "h w n -> (h w) n")])
