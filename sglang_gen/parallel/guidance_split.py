"""Parallelism over the batch: data parallel groups take batches in turn, guidance branches take a half each."""

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
    """Batches with their numbers as they are made at the same time: round r holds batch `r * groups + g` of group g."""
    numbered = list(enumerate(batches))
    return [numbered[start : start + groups] for start in range(0, len(numbered), groups)]


class GuidanceSplit:
    """Classifier-free guidance on two ranks, for pipelines that put both branches into one batch of the network.

    The network's inputs `[2 B, ...]` are halved, each rank computes one branch, and one all-gather per call gives both
    ranks the output `[2 B, ...]`. Arguments without the batch dimension pass as they are. A call with another batch is
    computed whole on both ranks: a pipeline may guide some steps only.
    """

    def __init__(self, networks: dict[str, nn.Module], mesh: Mesh, samples: int = 0) -> None:
        self.mesh, self.samples = mesh, samples
        self.split = False  # whether a call of this generation was halved
        self._halved = False
        for network in networks.values():
            network.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            network.register_forward_hook(self._after)

    def start(self, samples: int) -> None:
        """A generation of `samples` pictures begins."""
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
        """[B, ...] of this rank's branch -> [2 B, ...] in the order of the branches."""
        return gather(mine, self.mesh.axis("cfg")).wait().flatten(0, 1)
