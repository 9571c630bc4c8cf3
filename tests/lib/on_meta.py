"""A network without memory on one rank of a layout, for tests that have no plan."""

from collections.abc import Callable

import torch
from torch import nn

from sglang_gen.parallel.sharded_network import ParallelNetwork, Split


def on_meta(split: Split, create: Callable[[], nn.Module], dtype: torch.dtype) -> ParallelNetwork:
    """This rank's shard of the network that `create` returns."""
    with torch.device("meta"):
        network = create().to(dtype)
    split.shrink(network)
    return split.parallelize(network)
