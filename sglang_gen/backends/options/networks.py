"""The parts of a pipeline by their role."""

from typing import Any

from torch import nn

DENOISERS = ("transformer", "transformer_2", "unet")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def modules(pipeline: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The components of these names that are networks and present."""
    parts = {name: getattr(pipeline, name, None) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The denoising networks: one, or two where a pipeline splits the schedule between them."""
    return modules(pipeline, DENOISERS)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats: those that it declares, else the members of its longest list of blocks."""
    names = getattr(network, "_repeated_blocks", None) or []
    declared = [module for module in network.modules() if type(module).__name__ in names]
    lists = [list(child) for child in network.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return declared or max(lists, key=len, default=[])
