"""torch.compile for a diffusers pipeline: the repeated blocks (regional compilation), or the whole network."""

from typing import Any

import torch

from sglang_gen import env, log
from sglang_gen.backends.diffusers.roles import denoisers, repeated_blocks
from sglang_gen.config.schema import Compile


def apply(pipeline: Any, settings: Compile, device: str, deterministic: bool) -> bool | str:
    """Compile the denoising networks; returns False, "regional" or "full" for the run record.

    `forward` is compiled, not the module, so that hooks on the module stay outside the graph. Raises UserError if this
    machine has no compiler.
    """
    if not settings.enable_torch_compile:
        return False
    env.require_compiler(device)
    from sglang_gen.engine.compile import gpu_options  # imports dynamo, which takes several seconds

    options = gpu_options(device, deterministic) or None
    kinds = set()
    for network in denoisers(pipeline).values():
        blocks = repeated_blocks(network) if settings.regional else []
        for module in blocks or [network]:
            module.forward = torch.compile(module.forward, options=options)
        kinds.add("regional" if blocks else "full")
        if settings.regional and not blocks:
            log.warning(
                f"compile.regional has no effect: {type(network).__name__} has no repeated blocks, so all of it is "
                "compiled"
            )
    return " and ".join(sorted(kinds))
