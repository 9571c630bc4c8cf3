"""Where the time of one evaluation goes: what kinds of operators take which share of it.

    python -m tools.bench.profiles --work unet --dtype bfloat16

Ours eager and with its blocks compiled, and diffusers' in the same dtype. Times are torch.profiler's, of the operators
alone and without what they call: of the host on a CPU, of the kernels on a GPU. Watching costs time itself: read the
shares, and the milliseconds beside those of `tools.bench.networks`.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from tools.bench import networks, works

KINDS = {  # the first that a name fits counts
    "fused loops": "cpp_|triton_",
    "attention": "attention|flash|fmha|sage",
    "convolutions": "conv",
    "products": "mm$|mm_|linear|gemm|matmul|cutlass|nvjet",
    "norms": "norm",
    "activations": "gelu|silu|sigmoid|tanh|softmax",
    "copies": "copy|cat|clone|contiguous|reorder|to_dense|resize|empty|stack|pad|upsample",
    "other loops": "",
}
CALLS = 3  # that are watched


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


@torch.no_grad()
def shares(call: networks.Call, device: str) -> tuple[float, Counter[str]]:
    """Milliseconds of one call, and of each kind of operator in it."""
    call()
    gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as watched:
        for _ in range(CALLS):
            call()
    found: Counter[str] = Counter()
    for event in watched.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        found[kind_of(event.key)] += spent / 1000 / CALLS
    return sum(found.values()), found


def table(found: Mapping[str, tuple[float, Counter[str]]]) -> str:
    """Markdown: a line for each network."""
    kinds = [kind for kind in KINDS if any(times[kind] > 0.001 * total for total, times in found.values())]
    lines = [f"| what | ms | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    for name, (total, times) in found.items():
        parts = " | ".join(f"{times[kind] / total:.1%}" for kind in kinds)
        lines.append(f"| {name} | {total:.0f} | {parts} |")
    return "\n".join(lines)


def measured(work: works.Work, device: str, dtype: torch.dtype) -> str:
    """The table of one work."""
    inductor.cpp.enable_kernel_profile = True  # otherwise loops of compiled blocks have no name
    with tempfile.TemporaryDirectory() as temporary:
        folder = works.stored(work, Path(temporary))
        ours = partial(
            networks.our_call, work, partial(works.ours, work, folder, dtype, device), device,
            networks.kernel_of_auto(work, device, dtype),
        )  # fmt: skip
        found = {}
        for name, compiled in (("sglang-gen, eager", False), (networks.OURS, True)):
            found[name] = shares(ours(compiled=compiled), device)
        network, arguments = works.theirs(work, folder, dtype, device)

        def theirs() -> Any:
            return network(**arguments, return_dict=False)[0]

        found["diffusers"] = shares(theirs, device)
    return table(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="unet,dit", help=f"of {', '.join(works.WORKS)} (default unet,dit)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    given = parser.parse_args()
    for name in given.work.split(","):
        work = works.WORKS[name]()
        print(
            f"### {work.title}, {given.dtype}\n\n{measured(work, given.device, getattr(torch, given.dtype))}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
