"""The attention op: a module without parameters, on which kernels and sequence parallelism are set."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attend(nn.Module):
    """softmax(q k^T / sqrt(D)) v for q `[B, H, L, D]`, k and v `[B, H, S, D]`; the result is `[B, H, L, D]`."""

    kernel: Kernel

    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.nn.functional.scaled_dot_product_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kernel(q, k, v)
