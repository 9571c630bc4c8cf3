"""The parts of a pipeline by their role."""

from typing import Any

from torch import nn

from sglang_gen.perf.flops import compute_dtype
from sglang_gen.types import DENOISERS


def modules(pipeline: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The components of these names that are networks and present."""
    parts = {name: getattr(pipeline, name, None) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The denoising networks: one, or two where a pipeline splits the schedule between them."""
    return modules(pipeline, DENOISERS)


def dtype_of(pipeline: Any) -> dict[str, str]:
    """`{"dtype": name}` of what the first denoising network computes in, read back; nothing without a network."""
    found = [compute_dtype(network) for network in denoisers(pipeline).values()]
    return {"dtype": str(found[0]).removeprefix("torch.")} if found and found[0] else {}


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats: those that it declares, else the members of its longest list of blocks."""
    names = getattr(network, "_repeated_blocks", None) or []
    declared = [module for module in network.modules() if type(module).__name__ in names]
    lists = [list(child) for child in network.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return declared or max(lists, key=len, default=[])
