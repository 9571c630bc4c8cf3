"""Parallelism over the batch: data parallel groups process batches in turn, each guidance rank half of a batch."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from sglang_gen.errors import UserError
from sglang_gen.parallel.collectives import gather
from sglang_gen.parallel.mesh import Mesh

T = TypeVar("T")


def rounds(batches: Sequence[T], groups: int) -> list[list[tuple[int, T]]]:
    """Numbered batches by round: in round r group g generates batch `r * groups + g`."""
    numbered = list(enumerate(batches))
    return [numbered[start : start + groups] for start in range(0, len(numbered), groups)]


class GuidanceSplit:
    """Classifier-free guidance on two ranks, for pipelines that run both branches as one batch.

    Forward hooks halve the network's inputs `[2 B, ...]`, each rank computes one branch, and one all-gather per call
    gives both ranks the output `[2 B, ...]`. Arguments without a batch dimension are not halved. A call with another
    batch size is computed in full on both ranks, because a pipeline may guide only some steps.
    """

    def __init__(self, networks: dict[str, nn.Module], mesh: Mesh, samples: int = 0) -> None:
        self.mesh, self.samples = mesh, samples
        self.split = False  # whether any call of this generation was halved
        self._halved = False
        for network in networks.values():
            network.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            network.register_forward_hook(self._after)

    def start(self, samples: int) -> None:
        """Begin a generation of `samples` images."""
        self.samples, self.split = samples, False

    def _before(self, network: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        size = next(leaf.shape[0] for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor) and leaf.ndim)
        self._halved = size == 2 * self.samples
        if not self._halved:
            if not self.split:
                raise UserError(
                    f"parallel.enable_cfg_parallel: this pipeline does not give {type(network).__name__} both guidance "
                    "branches in one batch, so they cannot be computed on two ranks; run with parallel=single or dp2"
                )
            return args, kwargs
        self.split = True
        index = self.mesh.index("cfg")

        def mine(leaf: Any) -> Any:
            batched = isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == size
            return leaf.chunk(2)[index] if batched else leaf

        return tree_map(mine, (args, kwargs))  # type: ignore[no-any-return]

    def _after(self, network: nn.Module, args: Any, output: Any) -> Any:
        if not self._halved:
            return output
        return tree_map(lambda leaf: self._both(leaf) if isinstance(leaf, torch.Tensor) else leaf, output)

    def _both(self, mine: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` of this rank's branch -> `[2 B, ...]` in branch order."""
        return gather(mine, self.mesh.axis("cfg")).wait().flatten(0, 1)
