"""Matrix products of linear layers in float32 on a CPU.

torch computes them with the BLAS that it was built with, usually MKL, which does not use AVX-512 on processors of other
vendors; oneDNN, which torch uses for convolutions and for bfloat16, does.
"""

import torch
from torch import Tensor


def has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN for `[..., inputs]`, which most builds of torch contain; see `has_onednn`."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _opaque(x, weight, bias)
        return compiled
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


# Inductor lowers the operator above for packed weights only, so a graph calls it as it stands.
_opaque = torch.library.custom_op("sglang_gen::onednn_linear", mutates_args=())(_product)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
