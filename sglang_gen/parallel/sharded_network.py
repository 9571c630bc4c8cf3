"""A network over the ranks of one batch: what its table and its sharding make of it, in the order of transforms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sglang_gen.models.attention import Attend, Kernel
from sglang_gen.models.unet import SelfAttention
from sglang_gen.parallel import tensor
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.sequence import Gathering, Lengths, Ring, Summing, Ulysses
from sglang_gen.parallel.sequence_boundary import Door, Sharding
from sglang_gen.parallel.spatial import RowAttention, split_rows


@dataclass(frozen=True)
class Split:
    """How networks of one kind are spread over a mesh."""

    mesh: Mesh
    table: tensor.Table
    sharding: Sharding

    def shrink(self, network: nn.Module) -> dict[str, tensor.Part]:
        """Leave of a network on meta the part of this rank; which part of each of its tensors that is."""
        axis = self.mesh.axis("tp")
        return tensor.shrink(network, self.table, axis) if axis.size > 1 else {}

    def place(self, network: nn.Module) -> "Placed":
        """The shrunk network, loaded or not, among the ranks."""
        if self.mesh.size("tp") > 1:
            tensor.join(network, self.table, self.mesh.axis("tp"))
        return Placed(network, self)

    def twin(self, build: Callable[[], nn.Module], dtype: torch.dtype) -> "Placed":
        """This rank's part of a network without memory."""
        with torch.device("meta"):
            network = build().to(dtype)
        self.shrink(network)
        return self.place(network)


class Placed:
    """This rank's part of a network, and the door through which it is called."""

    def __init__(self, network: nn.Module, split: Split) -> None:
        self.network, self.mesh, self.sharding = network, split.mesh, split.sharding
        self.entrance: Any = network
        self.lengths: dict[str, Lengths] = {}
        self.leaves = self.sharding.leaves(network)
        if self.mesh.axis(SEQUENCE).size > 1:
            self._split_sequence()

    def _split_sequence(self) -> None:
        ring, ulysses = self.mesh.size("ring"), self.mesh.size("ulysses")
        self.lengths = {kind: Lengths(ring, ulysses) for kind in self.leaves}
        axis = self.mesh.axis(SEQUENCE)
        self.entrance = Door(self.network, self.sharding, axis, self.lengths)
        if self.sharding.spatial:
            split_rows(self.network, axis)
            if self.gathers_early:
                self._gather_early()

    @property
    def merges(self) -> bool:
        """Whether attention is merged from what several ranks' keys and values give."""
        return self.mesh.size("ring") > 1 and not self.gathers_early

    @property
    def gathers_early(self) -> bool:
        """Whether keys and values of rows are gathered before the leaf: nothing else is done to tokens there."""
        return self.sharding.spatial and self.mesh.size("ring") > 1 and self.mesh.size("ulysses") == 1

    def _gather_early(self) -> None:
        kinds = {id(leaf): kind for kind, leaves in self.leaves.items() for leaf in leaves}
        for name, module in list(self.network.named_modules()):
            if isinstance(module, SelfAttention):
                lengths = self.lengths[kinds[id(module.attend)]]
                self.network.set_submodule(name, RowAttention(module, self.mesh.axis("ring"), lengths))

    def set_kernel(self, kernel: Kernel, summing: Summing | None, to_text: Kernel | None = None) -> None:
        """Every attention by this kernel; `summing` is the same with its log-sum-exp, if it has one.

        `to_text` is that of attentions from a picture to a text, where they have another.
        """
        for module in self.network.modules():
            if isinstance(module, Attend):
                module.kernel = to_text or kernel
        for leaves in self.leaves.values():
            for leaf in leaves:
                leaf.kernel = kernel
        ring, ulysses = self.mesh.axis("ring"), self.mesh.axis("ulysses")
        for kind, leaves in self.leaves.items():
            for leaf in leaves:
                if self.merges:
                    lengths = self.lengths[kind]
                    leaf.kernel = Ring(summing, ring, lengths) if summing else Gathering(kernel, ring, lengths)
                if ulysses.size > 1:
                    leaf.kernel = Ulysses(leaf.kernel, ulysses, ring.index, self.lengths[kind])
