"""Sparse attention over image tokens with FlexAttention (Dong et al. 2024): windows and tiles.

A pattern defines which image tokens attend to each other; text tokens attend to and are attended by all tokens. Any
pattern except the dense one changes the result.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sglang_gen import env
from sglang_gen.errors import RunError, UserError, nearest
from sglang_gen.models.attention import Kernel

KEYS = ("window", "tile", "reach")
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) -> whether query attends to key


@dataclass(frozen=True)
class Grid:
    """Layout of a sequence: `before` text tokens, `rows` x `columns` image tokens, `after` text tokens."""

    rows: int
    columns: int
    before: int = 0
    after: int = 0

    @property
    def tokens(self) -> int:
        return self.before + self.rows * self.columns + self.after


@dataclass(frozen=True)
class Pattern:
    """With `window` a token attends to tokens at most `window` rows and columns away.

    With `tile` the image is divided into tiles of `tile` x `tile` tokens, and a tile attends to tiles at most `reach`
    tiles away. With neither, attention is dense.
    """

    window: int | None = None
    tile: int | None = None
    reach: int = 1

    @property
    def dense(self) -> bool:
        return self.window is None and self.tile is None

    def describe(self) -> str:
        if self.dense:
            return "dense"
        return f"window={self.window}" if self.window is not None else f"tile={self.tile}, reach={self.reach}"


def parse(config: Mapping[str, Any]) -> Pattern:
    """Parse attention.backend_config. Raises UserError that names the invalid key."""
    for key, value in config.items():
        if key not in KEYS:
            raise UserError(f"attention.backend_config: unknown key '{key}'{nearest(key, KEYS)}")
        least = 1 if key == "tile" else 0
        if type(value) is not int or value < least:
            raise UserError(f"attention.backend_config: '{key}' is a whole number of at least {least}, not {value!r}")
    if "window" in config and "tile" in config:
        raise UserError("attention.backend_config: 'window' and 'tile' are two patterns; give one")
    if "reach" in config and "tile" not in config:
        raise UserError("attention.backend_config: 'reach' counts tiles, and there is no 'tile'")
    return Pattern(**config)


def mask(pattern: Pattern, grid: Grid) -> Mask:
    """The mask function of `pattern`; query and key are token indices in the sequence of `grid`."""
    end, columns = grid.before + grid.rows * grid.columns, grid.columns
    unit, reach = (1, pattern.window) if pattern.window is not None else (pattern.tile or 1, pattern.reach)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        text = (query < grid.before) | (query >= end) | (key < grid.before) | (key >= end)
        q, k = query - grid.before, key - grid.before
        rows = (q // columns // unit - k // columns // unit).abs()
        across = (q % columns // unit - k % columns // unit).abs()
        return text | ((rows <= reach) & (across <= reach))

    return seen


def _block_mask(pattern: Pattern, grid: Grid, device: str) -> Any:
    """Which blocks of queries and keys attend to each other.

    On a GPU this is compiled: eager code materializes one byte, and several integers, for each pair of tokens. On a CPU
    generating code takes longer than the mask.
    """
    from torch.nn.attention import flex_attention

    create = flex_attention.create_block_mask
    if device == "cuda":
        create = torch.compile(create, dynamic=False)
    return create(mask(pattern, grid), None, None, grid.tokens, grid.tokens, device=device)


def kernel(pattern: Pattern, grids: Iterable[Grid], device: str) -> Kernel:
    """FlexAttention for sequences of these grids; other attention calls, such as over text only, stay dense.

    Raises UserError if FlexAttention cannot be compiled here. The kernel raises RunError at a recompilation that is not
    expected.
    """
    env.require_compiler(device, "attention.backend: 'flex' is compiled, which", "attention=sdpa")
    # These import dynamo, which takes seconds.
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.nn.attention.flex_attention import flex_attention

    masks = {} if pattern.dense else {grid.tokens: _block_mask(pattern, grid, device) for grid in grids}
    # fullgraph: exceeding the recompile limit raises instead of falling back to the unfused implementation.
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    called = set()

    def sparse(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        if torch.compiler.is_compiling():  # inside a compiled block, FlexAttention becomes part of its graph
            inside: Tensor = flex_attention(q, k, v, block_mask=block_mask)
            return inside
        call = tuple((x.shape, x.stride(), x.dtype) for x in (q, k, v))
        allowed: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if call not in called:
            called.add(call)
            allowed = dynamo.patch(recompile_limit=max(len(called), dynamo.recompile_limit))
        try:
            with allowed:
                out: Tensor = compiled(q, k, v, block_mask=block_mask)
        except FailOnRecompileLimitHit as error:
            raise RunError(
                f"attention.backend: flex was compiled for more than the {len(called)} shapes of this run"
            ) from error
        return out

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inside = q.shape[2] == k.shape[2]
        if inside and (pattern.dense or q.shape[2] in masks):
            return sparse(q, k, v, masks.get(q.shape[2]))
        return scaled_dot_product_attention(q, k, v)

    return attend
