"""Times of the blocks of a denoising network (perf.blocks), measured from outside of the network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sglang_gen.engine.block_names import BlockNames
from sglang_gen.models.chain import Block, Chain, State
from sglang_gen.perf.clock import Timer


@dataclass
class BlockCalls:
    """`marks` holds the beginning and end of each call."""

    name: str
    marks: list[tuple[Any, Any]] = field(default_factory=list)


class TimedChain(Chain):
    """Times each block while `on` is True. The times are read after the loop, so that no block waits for the device."""

    def __init__(self, network: nn.Module, timer: Timer) -> None:
        super().__init__()
        self.names = BlockNames(network)
        self.timer, self.on = timer, False
        self.blocks: dict[str, BlockCalls] = {}  # in the order of their first call

    def forward(
        self, blocks: Sequence[Block], state: State, conditions: Sequence[tuple[Any, ...]], *shared: Any
    ) -> State:
        if not self.on:
            return super().forward(blocks, state, conditions, *shared)
        for block, condition in zip(blocks, conditions, strict=True):
            start = self.timer.mark()
            state = block(*state, *condition, *shared)
            name = self.names.of(block)
            self.blocks.setdefault(name, BlockCalls(name)).marks.append((start, self.timer.mark()))
        return state

    def report(self) -> list[dict[str, Any]]:
        """`[{name, calls, mean_ms, total_ms}]` of the blocks, in order. Waits for the device."""
        self.timer.synchronise()
        rows = []
        for block in self.blocks.values():
            times = [self.timer.elapsed_ms(start, stop) for start, stop in block.marks]
            total = sum(times)
            rows.append({"name": block.name, "calls": len(times), "mean_ms": total / len(times), "total_ms": total})
        return rows
