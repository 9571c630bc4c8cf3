"""Names the blocks of a pipeline's denoising networks in a profiler trace (perf.trace)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from sglang_gen.backends.diffusers.roles import repeated_blocks


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name: the repeated blocks, the modules around them, and the elements of the network's own lists."""
    names = {id(module): name for name, module in network.named_modules()}
    lists = {name: child for name, child in network.named_children() if isinstance(child, nn.ModuleList)}
    chosen = {f"{name}.{index}" for name, child in lists.items() for index in range(len(child))}
    for block in repeated_blocks(network):
        path = names[id(block)].split(".")
        chosen |= {".".join(path[: end + 1]) for end in range(len(path))}
    return {
        name: module
        for name, module in network.named_modules()
        if name in chosen and not isinstance(module, nn.ModuleList)  # which are not called
    }


@contextmanager
def named_blocks(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context in which each block of these networks is a range of the profiler.

    Hooks on modules stay outside of a compiled `forward`. Of several networks, each name follows its network's.
    """
    handles = []
    for network_name, network in networks.items():
        for name, block in blocks(network).items():
            hooks = _Range(f"{network_name}.{name}" if len(networks) > 1 else name)
            handles.append(block.register_forward_pre_hook(hooks.begin))
            handles.append(block.register_forward_hook(hooks.end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Range:
    """The range of one block, which begins before its forward and ends after it."""

    def __init__(self, name: str) -> None:
        self.name, self.open = name, []  # type: tuple[str, list[Any]]

    def begin(self, *_: Any) -> None:
        self.open.append(record_function(self.name).__enter__())  # type: ignore[no-untyped-call]

    def end(self, *_: Any) -> None:
        if self.open:
            self.open.pop().__exit__(None, None, None)
