"""Exact attention on a CPU whose products are oneDNN's, by blocks of query rows.

torch's kernels multiply with MKL, which does not use AVX-512 on processors of other vendors. Scores and softmax are in
float32; in bfloat16 the probabilities are rounded before the second product, as torch's flash kernel does.
"""

import torch
from torch import Tensor

from sglang_gen.models.matmul import has_onednn, onednn_linear

SCORES = 2**19  # in one block: 2 MB in float32, which fits into a cache of level 2 or 3


def runs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype on this processor."""
    if dtype is torch.bfloat16:
        return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32 and has_onednn()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q `[B, H, L, D]`, k and v `[B, H, S, D]`."""
    compute = _opaque if torch.compiler.is_compiling() else _blocks
    out: Tensor = compute(q, k, v, False)[0]
    return out


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The attention and the log-sum-exp `[B, H, L]` of its scores, in float32."""
    compute = _opaque if torch.compiler.is_compiling() else _blocks
    out, lse = compute(q, k, v, True)
    return out, lse


def rows_of_block(length: int, keys: int) -> int:
    """Query rows whose scores are computed at once."""
    return max(64, min(length, SCORES // max(keys, 1)))


def _blocks(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    out, lse = _results(q, with_lse)
    length, keys = q.shape[2], k.shape[2]
    rows = rows_of_block(length, keys)
    q, k = q.float() * q.shape[-1] ** -0.5, k.float().contiguous()
    values = v.mT.contiguous()  # [B, H, D, S]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in range(0, length, rows):
                block = slice(start, start + rows)
                scores = onednn_linear(q[b, h, block], k[b, h])  # [rows, S]
                if with_lse:
                    lse[b, h, block] = scores.logsumexp(dim=-1)
                out[b, h, block] = onednn_linear(scores.softmax(dim=-1).to(v.dtype), values[b, h])
    return out, lse


def _results(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Memory for the attention, with the strides that the following linear layer reads best, and the log-sum-exp."""
    batch, heads, length, width = q.shape
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    return out, q.new_empty((batch, heads, length) if with_lse else (0,), dtype=torch.float32)


# Inductor would unroll the loops.
_opaque = torch.library.custom_op("sglang_gen::onednn_attention", mutates_args=())(_blocks)


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    return _results(q, with_lse)
