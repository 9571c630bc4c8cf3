"""The MMDiT of Stable Diffusion 3 and 3.5 (Esser et al. 2024, section 4; figure 2).

Text and image are two streams with separate weights and joint attention. Their modulations depend only on the timestep
and the pooled text, so `condition` computes them for all steps at once.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor, nn

from sglang_gen.models import chain
from sglang_gen.models.attention import QKV, Attend
from sglang_gen.models.chain import Chain
from sglang_gen.models.layers import Conv2d, Embedder, FeedForward, Linear, Modulation, modulate, sinusoid


@dataclass(frozen=True)
class Config:
    patch: int
    channels_in: int
    channels_out: int
    layers: int
    heads: int
    head_dim: int
    text_width: int
    pooled_width: int
    positions: int  # side of the square table of position embeddings, in patches
    dual_layers: tuple[int, ...]  # blocks with a second attention, over the image stream only (SD 3.5 medium)
    qk_norm: bool

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Conditioning:
    """Inputs that are computed once for all steps. S steps, batch B, T text tokens, L patches, width D."""

    text: Tensor  # [B, T, D]
    positions: Tensor  # [L, D]
    blocks: list[tuple[Tensor, ...]]  # modulations of image [S, B, 6 or 9, D] and text [S, B, 6, D], last [S, B, 2, D]
    out_modulation: Tensor  # [S, B, 2, D]

    @cached_property
    def steps(self) -> "list[Conditioning]":
        """The conditioning of each step, without the dimension S."""
        return [
            replace(self, blocks=chain.at(step, self.blocks), out_modulation=modulation)
            for step, modulation in enumerate(self.out_modulation)
        ]


class Projections(nn.Module):
    """Fused query, key and value projection of one stream, with optional RMS norms of query and key."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = Linear(config.width, dict.fromkeys(QKV, config.width))
        self.norm_q = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, L, D]` -> three of `[B, H, L, D/H]`."""
        q, k, v = rearrange(self.to_qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)
        return self.norm_q(q), self.norm_k(k), v


class SelfAttention(nn.Module):
    """Self-attention of the image stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image = Projections(config)
        self.attend = Attend()
        self.to_out = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(rearrange(self.attend(*self.image(x)), "b h l d -> b l (h d)"))


class JointAttention(nn.Module):
    """Attention over image and text tokens together."""

    def __init__(self, config: Config, last: bool) -> None:
        super().__init__()
        self.image, self.text = Projections(config), Projections(config)
        self.attend = Attend()
        self.to_out = Linear(config.width, config.width)
        self.to_text_out = None if last else Linear(config.width, config.width)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        pairs = zip(self.image(x), self.text(text), strict=True)
        both = self.attend(*(torch.cat(pair, dim=2) for pair in pairs))
        out, text_out = rearrange(both, "b h l d -> b l (h d)").split([x.shape[1], text.shape[1]], dim=1)
        return self.to_out(out), None if self.to_text_out is None else self.to_text_out(text_out)


class Block(nn.Module):
    """One block of figure 2; the last block has no text stream after its attention."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        last = index == config.layers - 1
        dual = index in config.dual_layers
        self.modulation = Modulation(config.width, 9 if dual else 6)
        self.text_modulation = Modulation(config.width, 2 if last else 6)
        self.attention = JointAttention(config, last)
        self.attention_2 = SelfAttention(config) if dual else None
        self.ff = FeedForward(config.width)
        self.ff_text = None if last else FeedForward(config.width)

    def forward(self, x: Tensor, text: Tensor, m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Image `[B, L, D]`, text `[B, T, D]`, their modulations `[B, 6 or 9, D]` and `[B, 6 or 2, D]`."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = m.split(1, dim=1)
        if self.ff_text is None:
            text_scale, text_shift = n.split(1, dim=1)
        else:
            text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = n.split(1, dim=1)
        out, text_out = self.attention(modulate(x, shift, scale), modulate(text, text_shift, text_scale))
        start = x
        x = x + gate * out
        if self.attention_2 is not None:
            shift_2, scale_2, gate_2 = dual
            x = x + gate_2 * self.attention_2(modulate(start, shift_2, scale_2))
        x = x + gate_ff * self.ff(modulate(x, shift_ff, scale_ff))
        if self.ff_text is not None:
            text = text + text_gate * text_out
            text = text + text_gate_ff * self.ff_text(modulate(text, text_shift_ff, text_scale_ff))
        return x, text


class SD3(nn.Module):
    positions: Tensor  # [1, side * side, D]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patches = Conv2d(config.channels_in, config.width, config.patch, stride=config.patch)
        self.register_buffer("positions", torch.empty(1, config.positions**2, config.width))
        self.timestep_embedder = Embedder(256, config.width)
        self.pooled_embedder = Embedder(config.pooled_width, config.width)
        self.text_embedder = Linear(config.text_width, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.out_modulation = Modulation(config.width, 2)
        self.out = Linear(config.width, config.patch**2 * config.channels_out)
        self.chain = Chain()

    def condition(self, timesteps: Tensor, text: Tensor, pooled: Tensor, height: int, width: int) -> Conditioning:
        """Timesteps `[S]` in 0..1000, text `[B, T, C]`, pooled text `[B, P]`; latents are `height` x `width`."""
        times = self.timestep_embedder(sinusoid(timesteps.to(pooled.device), 256).to(pooled.dtype))  # [S, D]
        vector = times[:, None] + self.pooled_embedder(pooled)  # [S, B, D]
        return Conditioning(
            self.text_embedder(text),
            self._crop(height // self.config.patch, width // self.config.patch),
            [(block.modulation(vector), block.text_modulation(vector)) for block in self.blocks],
            self.out_modulation(vector),
        )

    def forward(self, latents: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """Velocity `[B, C, h, w]` of the latents at the step's timestep."""
        return self.evaluate(latents, conditioning.steps[step])

    def evaluate(self, latents: Tensor, c: Conditioning) -> Tensor:
        """`forward` for the conditioning of one step."""
        patch = self.config.patch
        x = rearrange(self.patches(latents), "b d h w -> b (h w) d") + c.positions
        x, _ = self.chain([*self.blocks], (x, c.text), c.blocks)
        scale, shift = c.out_modulation.split(1, dim=1)
        x = self.out(modulate(x, shift, scale))
        rows = latents.shape[-2] // patch
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)

    def _crop(self, rows: int, columns: int) -> Tensor:
        """The central `rows` x `columns` of the position table, `[rows * columns, D]`."""
        side = self.config.positions
        assert max(rows, columns) <= side, f"{rows} x {columns} patches and a table of {side} a side"
        table = rearrange(self.positions, "1 (h w) d -> h w d", h=side)
        top, left = (side - rows) // 2, (side - columns) // 2
        return rearrange(table[top : top + rows, left : left + columns], "h w d -> (h w) d")
