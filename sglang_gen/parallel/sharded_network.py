"""Applies the parallelism transforms to a network in order: shrink, load, tensor parallel, sequence parallel."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from sglang_gen.models.attention import Attend, Kernel, SelfAttention
from sglang_gen.models.layers import Shard
from sglang_gen.parallel import tensor
from sglang_gen.parallel.mesh import SEQUENCE, Mesh
from sglang_gen.parallel.sequence import CurrentLengths, Gathering, KernelWithLSE, Ring, Ulysses
from sglang_gen.parallel.sequence_boundary import SequenceBoundary, Sharding
from sglang_gen.parallel.spatial import RowAttention, split_rows


@dataclass(frozen=True)
class Split:
    """How the networks of one family are sharded over a mesh."""

    mesh: Mesh
    table: tensor.Table
    sharding: Sharding

    def shrink(self, network: nn.Module) -> dict[str, Shard]:
        """Shrink a network on the meta device to this rank's tensor parallel shard; returns each tensor's shard."""
        axis = self.mesh.axis("tp")
        return tensor.shrink(network, self.table, axis) if axis.size > 1 else {}

    def insert_collectives(self, network: nn.Module) -> None:
        """Set the collectives of tensor parallelism on a shrunk network."""
        tensor.insert_collectives(network, self.table, self.mesh.axis("tp"))

    def parallelize(self, network: nn.Module) -> "ParallelNetwork":
        """Insert the collectives into a shrunk network, before or after its weights are loaded."""
        if self.mesh.size("tp") > 1:
            self.insert_collectives(network)
        parallel = ParallelNetwork(network, self)
        if self.mesh.axis(SEQUENCE).size > 1:
            parallel.split_sequence()
        return parallel


class ParallelNetwork:
    """This rank's shard of a network. Callers use `entrance`: the network, or its SequenceBoundary."""

    def __init__(self, network: nn.Module, split: Split) -> None:
        self.network, self.mesh, self.sharding = network, split.mesh, split.sharding
        self.entrance: Any = network
        self.returns_lse = True  # whether the run's kernel does; a trace on meta exchanges what such a run exchanges
        self.lengths: dict[str, CurrentLengths] = {}
        self.attention_ops = self.sharding.attention_ops(network)

    def split_sequence(self) -> None:
        """Let this rank compute its shard of the tokens, or of the rows of a spatial network."""
        ring, ulysses = self.mesh.size("ring"), self.mesh.size("ulysses")
        self.lengths = {kind: CurrentLengths(ring, ulysses) for kind in self.attention_ops}
        axis = self.mesh.axis(SEQUENCE)
        self.entrance = SequenceBoundary(self.network, self.sharding, axis, self.lengths)
        if self.sharding.spatial:
            split_rows(self.network, axis)
            if self.gathers_early:
                self._gather_early()

    @property
    def merges(self) -> bool:
        """Whether attention merges partial results over the keys and values of several ranks."""
        return self.mesh.size("ring") > 1 and not self.gathers_early

    @property
    def gathers_early(self) -> bool:
        """Whether spatial networks gather keys and values before the attention op, overlapped with the query."""
        return self.sharding.spatial and self.mesh.size("ring") > 1 and self.mesh.size("ulysses") == 1

    def _gather_early(self) -> None:
        kinds = {id(op): kind for kind, ops in self.attention_ops.items() for op in ops}
        for name, module in list(self.network.named_modules()):
            if isinstance(module, SelfAttention):
                lengths = self.lengths[kinds[id(module.attend)]]
                self.network.set_submodule(name, RowAttention(module, self.mesh.axis("ring"), lengths))

    def set_kernel(self, kernel: Kernel, with_lse: KernelWithLSE | None, to_text: Kernel | None = None) -> None:
        """Set the kernel of every attention op; `with_lse` is the same kernel with its log-sum-exp, if it returns one.

        `to_text` is the kernel of cross-attention, if it differs.
        """
        for module in self.network.modules():
            if isinstance(module, Attend):
                module.kernel = to_text or kernel
        for ops in self.attention_ops.values():
            for op in ops:
                op.kernel = kernel
        ring, ulysses = self.mesh.axis("ring"), self.mesh.axis("ulysses")
        for kind, ops in self.attention_ops.items():
            for op in ops:
                if self.merges:
                    lengths = self.lengths[kind]
                    op.kernel = Ring(with_lse, ring, lengths) if with_lse else Gathering(kernel, ring, lengths)
                if ulysses.size > 1:
                    op.kernel = Ulysses(op.kernel, ulysses, ring.index, self.lengths[kind])
