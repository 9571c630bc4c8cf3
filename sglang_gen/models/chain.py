"""The loop over a network's blocks: a module without parameters that can be replaced, as the kernel of `Attend` can.

Step caches, offloading, timings and skipping of blocks replace it; networks know none of them. A block is called with
the state, its own conditioning and what all blocks share, so a block that is left out does not change what the next one
reads.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

State = tuple[Any, ...]  # of a transformer: image and text; of a UNet: feature map and skip connections
Block = Callable[..., State]


class Chain(nn.Module):
    """Runs blocks one after the other."""

    def forward(
        self, blocks: Sequence[Block], state: State, conditions: Sequence[tuple[Any, ...]], *shared: Any
    ) -> State:
        """The state after all blocks; `conditions` has the conditioning of each block, `shared` that of all of them."""
        for block, condition in zip(blocks, conditions, strict=True):
            state = block(*state, *condition, *shared)
        return state


def at(step: int, conditions: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The conditioning of each block at one step: views of tensors `[S, ...]`, without the dimension S."""
    return [tuple(tensor[step] for tensor in condition) for condition in conditions]
