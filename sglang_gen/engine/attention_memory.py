"""Bytes that attention kernels hold besides their inputs and their result, by the algorithm of each kernel."""

from torch import Tensor

from sglang_gen.engine import onednn_attention
from sglang_gen.engine.attention_kernels import ONEDNN

FLOAT32 = 4  # bytes


def held_bytes(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes that the kernel of this name holds for q `[B, H, L, D]`, k and v `[B, H, S, D]`.

    Only `math` holds scores for all pairs of tokens. A fused kernel holds one log-sum-exp for each row of them; the
    blocks of scores that it works on fit into a cache, and are not counted.
    """
    rows, keys = q.shape[:3].numel(), k.shape[2]
    if kernel in ("math", "sdpa(math)"):  # scores and their softmax, after float32 copies of q, k and v
        copies = q.numel() + k.numel() + (v.numel() if v.element_size() < FLOAT32 else 0)
        return FLOAT32 * (2 * rows * keys + copies)
    if kernel == ONEDNN:  # q and k in float32, v transposed, and a block of scores and its softmax
        block = min(q.shape[2], onednn_attention.rows_of_block(q.shape[2], keys))
        return FLOAT32 * (q.numel() + k.numel() + 2 * block * keys) + v.numel() * v.element_size()
    return FLOAT32 * rows
