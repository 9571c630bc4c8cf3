"""Which kernels attention=auto tries on the shapes of published networks, in the order of their time."""

import math
from functools import partial
from typing import Any

import torch

from sglang_gen.engine import attention_autotune, attention_kernels
from tools.bench import networks, works
from tools.gpu_first import network
from tools.gpu_first.sections import Settings, table


@torch.no_grad()
def order(settings: Settings) -> str:
    """Milliseconds of all attention calls of a step, by kernel."""
    parts = []
    for work in network.chosen(settings).values():
        dtype = network.dtype(settings)
        shapes = works.traced_on_meta(work, (), works.outline(work, dtype), partial(_evaluate, work, dtype)).attention
        names = attention_kernels.candidates(shapes, settings.device, dtype)
        kernels = {name: attention_kernels.named(name).kernel for name in names}
        seconds = attention_autotune.measure(kernels, shapes, settings.device, dtype)
        rows = [
            (name, f"{1000 * seconds[name]:.2f}" if math.isfinite(seconds[name]) else "refuses these shapes")
            for name in sorted(seconds, key=lambda name: seconds[name])
        ]
        calls = ", ".join(f"{count} x {list(shape)}" for shape, count in shapes.items())
        chosen = networks.kernel_of_auto(work, settings.device, dtype).name
        parts.append(
            f"### {work.title}\n\n{table(('kernel', 'ms a step'), rows)}\n\n"
            f"attention=auto chooses {chosen}. Calls (B, H, L, S, D): {calls}."
        )
    return "\n\n".join(parts)


def _evaluate(work: works.Work, dtype: torch.dtype, meta_copy: Any) -> None:
    latents, *given = (tensor.to("meta") for tensor in work.inputs(dtype, "cpu"))
    meta_copy(latents, works.conditioning(work, given, meta_copy, meta=True), 0)
