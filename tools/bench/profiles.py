"""Profiles one evaluation of a network: the fraction of the time that each kind of operator takes.

    python -m tools.bench.profiles --work dit --dtype bfloat16

Profiled are our network, eager and with compiled blocks, and diffusers' network in the same dtype. Times are self times
of torch.profiler: of operators on a CPU, of kernels on a GPU. Profiling takes time itself, so rely on the fractions,
and take absolute times from `tools.bench.networks`.
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

from tools.bench import network_entries, networks, works

KINDS = {  # kind -> pattern; the first match counts
    "fused loops": "cpp_|triton_",
    "attention": "attention|flash|fmha|sage",
    "convolutions": "conv",
    "products": "mm$|mm_|linear|gemm|matmul|cutlass|nvjet",
    "norms": "norm",
    "activations": "gelu|silu|sigmoid|tanh|softmax",
    "copies": "copy|cat|clone|contiguous|reorder|to_dense|resize|empty|stack|pad|upsample",
    "other loops": "",
}
CALLS = 3  # profiled calls


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


@torch.no_grad()
def shares(call: networks.Call, device: str) -> tuple[float, Counter[str]]:
    """Milliseconds of one call, in total and for each kind of operator."""
    call()
    gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as watched:
        for _ in range(CALLS):
            call()
    times: Counter[str] = Counter()
    for event in watched.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        times[kind_of(event.key)] += spent / 1000 / CALLS
    return sum(times.values()), times


def table(profiles: Mapping[str, tuple[float, Counter[str]]]) -> str:
    """Markdown table, one line per network."""
    kinds = [kind for kind in KINDS if any(times[kind] > 0.001 * total for total, times in profiles.values())]
    lines = [f"| what | ms | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    for name, (total, times) in profiles.items():
        fractions = " | ".join(f"{times[kind] / total:.1%}" for kind in kinds)
        lines.append(f"| {name} | {total:.0f} | {fractions} |")
    return "\n".join(lines)


def measured(work: works.Work, device: str, dtype: torch.dtype) -> str:
    """Profile one work and return its table."""
    inductor.cpp.enable_kernel_profile = True  # otherwise loops of compiled blocks have no names
    with tempfile.TemporaryDirectory() as temporary:
        folder = works.stored(work, Path(temporary))
        ours = partial(
            network_entries.our_call, work, partial(works.ours, work, folder, dtype, device), device,
            networks.kernel_of_auto(work, device, dtype),
        )  # fmt: skip
        profiles = {}
        for mode in network_entries.MODES:
            profiles[network_entries.ours_name(dtype, mode)] = shares(ours(mode=mode), device)
        network, arguments = works.theirs(work, folder, dtype, device)

        def theirs() -> Any:
            return network(**arguments, return_dict=False)[0]

        profiles["diffusers"] = shares(theirs, device)
    return table(profiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=works.LAPTOP, help=f"of {', '.join(works.WORKS)} (default {works.LAPTOP})")
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
