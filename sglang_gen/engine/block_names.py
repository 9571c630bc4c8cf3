"""Names of the blocks of a denoising network, and their ranges in a profiler trace (perf.trace)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from sglang_gen.engine.caching.cached_chain import runner
from sglang_gen.models.chain import Block, Chain, State


class BlockNames:
    """Finds the name of each block of a network, such as `blocks.3`."""

    def __init__(self, network: nn.Module) -> None:
        self.names = {id(module): name for name, module in network.named_modules()}

    def of(self, block: Any) -> str:
        """The name of the block in its network; that of its first module if it is a stage of several."""
        modules = [block] if isinstance(block, nn.Module) else [each for each in vars(block).values() if each]
        return next((self.names[id(module)] for module in modules if id(module) in self.names), type(block).__name__)


class NamedChain(Chain):
    """Runs each block in a range of the profiler with the block's name."""

    def __init__(self, network: nn.Module, prefix: str) -> None:
        super().__init__()
        self.names, self.prefix = BlockNames(network), prefix

    def forward(
        self, blocks: Sequence[Block], state: State, conditions: Sequence[tuple[Any, ...]], *shared: Any
    ) -> State:
        for block, condition in zip(blocks, conditions, strict=True):
            with record_function(f"{self.prefix}{self.names.of(block)}"):
                state = block(*state, *condition, *shared)
        return state


@contextmanager
def named_blocks(network: Any, prefix: str = "") -> Iterator[None]:
    """Context in which each block of the network is a range of the profiler; its name follows `prefix`."""
    holder: Any = runner(network)
    chain, holder.chain = holder.chain, NamedChain(network, prefix)
    try:
        yield
    finally:
        holder.chain = chain
