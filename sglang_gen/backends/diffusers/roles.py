"""The components of a pipeline by their role."""

from typing import Any

from torch import nn

from sglang_gen.perf.flops import compute_dtype
from sglang_gen.types import DENOISERS


def modules(pipeline: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Those of the components `names` that the pipeline has and that are networks."""
    components = {name: getattr(pipeline, name, None) for name in names}
    return {name: component for name, component in components.items() if isinstance(component, nn.Module)}


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The denoising networks: one, or two if the pipeline splits the schedule between them."""
    return modules(pipeline, DENOISERS)


def dtype_of(pipeline: Any) -> dict[str, str]:
    """`{"dtype": name}` with the compute dtype of the first denoising network; empty without a network."""
    dtypes = [compute_dtype(network) for network in denoisers(pipeline).values()]
    return {"dtype": str(dtypes[0]).removeprefix("torch.")} if dtypes and dtypes[0] else {}


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: those that it declares, else the modules of its longest ModuleList."""
    names = getattr(network, "_repeated_blocks", None) or []
    declared = [module for module in network.modules() if type(module).__name__ in names]
    lists = [list(child) for child in network.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return declared or max(lists, key=len, default=[])
